"""`megatron-rl rewards CONFIG --on FILE`: score a file of completions as a run would, before it costs any GPU.

FILE has JSON lines with `completion`, and the keys of the run's data (data.prompt_key, data.answer_key); the files
under a run's rollouts/ are such. Of every row each reward is shown with its value, its notes (verdict, extracted) and
its time; then the mean of each, the share of each verdict, and the time of a call. A row that a reward fails on is
shown and counted.
"""

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.data.files import DataError, read_rows, require
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.rewards.pool import RewardPool, build_pool
from megatron_rl.rewards.references import check_references
from megatron_rl.rewards.scoring import BoundReward, RewardError, resolve_rewards, score

_SHOWN = 100
"""Characters of an extraction, a message."""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("rewards", help="score a file of completions with a run's rewards")
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of a run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="for example rewards.functions.0.weight=2")
    parser.add_argument("--on", metavar="FILE", type=Path, required=True, help="JSON lines with completion and answer")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Score and print; 1 if a reward failed on a row.

    Raises:
        UserError: the settings, the file, or a reference cannot be used.
    """
    config = load_config(arguments.config, arguments.overrides)
    rewards = resolve_rewards(config.rewards)
    if not rewards:
        raise UserError("rewards.functions: given [], allowed: at least one reward")
    rows = [_row(row, source, number, config) for number, (source, row) in enumerate(read_rows(arguments.on, "jsonl"))]
    check_references([prompt for prompt, _ in rows], rewards, tolerated=config.rewards.unreadable_references)
    pool = build_pool(config.rewards)
    tally = _Tally()
    try:
        for prompt, completion in rows:
            print(f"{prompt.source}  reference {_shown(prompt.answer)}")
            for reward in rewards:
                print(f"  {reward.name}: {_scored(prompt, completion, reward, pool, config, tally)}")
    finally:
        if pool is not None:
            pool.close()
    print("\n".join(["", *tally.summary(rewards)]))
    return 1 if tally.failed else 0


def _row(row: dict[str, Any], source: str, number: int, config: Config) -> tuple[Prompt, Completion]:
    text = require(row, "completion", source)
    if not isinstance(text, str):
        raise DataError(f"{source}: 'completion' must be a string, this is a {type(text).__name__}")
    prompt, answer = row.get(config.data.prompt_key, ""), row.get(config.data.answer_key)
    shown = prompt if isinstance(prompt, str) else str(prompt)
    return (
        Prompt(number, (), shown, None if answer is None else str(answer), source, row),
        Completion((), (), text, str(row.get("finish_reason", "stop")), 0),
    )


class _Tally:
    """What is told at the end."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.verdicts: dict[str, Counter[str]] = defaultdict(Counter)
        self.lost: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def summary(self, rewards: Sequence[BoundReward]) -> list[str]:
        """A line for each reward."""
        lines = []
        for name in (reward.name for reward in rewards):
            values, milliseconds = self.values[name], sorted(1000 * seconds for seconds in self.seconds[name])
            line = f"{name}: {len(values)} scored"
            if values:
                line += f", mean {statistics.fmean(values):.4g}"
            for word, counts in (("lost", self.lost), ("failed", self.failed)):
                line += f", {counts[name]} {word}" if counts[name] else ""
            for verdict, count in sorted(self.verdicts[name].items()):
                line += f", {verdict} {count / len(values):.1%}"
            lines.append(
                f"{line}; {statistics.median(milliseconds):.2f} ms in the median, {milliseconds[-1]:.2f} at most"
            )
        return lines


def _scored(
    prompt: Prompt, completion: Completion, reward: BoundReward, pool: RewardPool | None, config: Config, tally: _Tally
) -> str:
    """The line of one reward on one row."""
    start = time.perf_counter()
    try:
        (sample,) = score([prompt], [completion], [reward], pool=pool, lost_value=config.rewards.lost_value)
    except RewardError as error:
        tally.failed[reward.name] += 1
        return f"failed: {error}"
    finally:
        seconds = time.perf_counter() - start
        tally.seconds[reward.name].append(seconds)
    return _told(sample, reward, seconds, tally)


def _told(sample: Sample, reward: BoundReward, seconds: float, tally: _Tally) -> str:
    if sample.lost:
        tally.lost[reward.name] += 1
        return f"lost: {sample.lost[0]}"
    value, notes = sample.reward_terms[reward.name], sample.notes.get(reward.name, {})
    tally.values[reward.name].append(value)
    if "verdict" in notes:
        tally.verdicts[reward.name][notes["verdict"]] += 1
    told = "".join(f", {key} {_shown(note) if key != 'verdict' else note}" for key, note in notes.items())
    return f"{value:g}{told} ({1000 * seconds:.2f} ms)"


def _shown(text: str | None) -> str:
    if text is None:
        return "none"
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + " ...")
