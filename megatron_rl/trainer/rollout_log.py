"""Completions on disk, for people to read: rollouts/step_0000010.jsonl, one JSON object per completion.

A record is what the loop makes of a sample: step, prompt_id, source, prompt, completion, answer, reward, reward_terms,
advantage, finish_reason, num_tokens, weight_version. A file appears whole or not at all, and a resumed run writes the
same names again, so there is nothing to repair besides steps that the resumed run has not reached yet.
"""

import json
from pathlib import Path
from typing import Any

from megatron_rl.trainer.metrics_log import finite_or_null
from megatron_rl.trainer.run_directory import RunDirectory, write_atomically


def write_rollouts(run: RunDirectory, step: int, records: list[dict[str, Any]]) -> Path:
    """Write the completions of `step`, replacing what an interrupted run left there.

    Numbers that are not finite become null, as in metrics.jsonl. Text stays UTF-8; a lone surrogate, which a decoder
    can leave behind and UTF-8 cannot hold, becomes '?'.

    Returns:
        The file.
    """
    lines = [json.dumps(finite_or_null(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    run.rollouts_dir.mkdir(parents=True, exist_ok=True)
    file = run.rollout_file(step)
    write_atomically(file, "".join(lines).encode("utf-8", errors="replace").decode("utf-8"))
    return file


def rollout_steps(run: RunDirectory) -> list[int]:
    """Steps that have completions on disk, ascending."""
    names = (file.stem.removeprefix("step_") for file in run.rollouts_dir.glob("step_*.jsonl"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_rollouts(run: RunDirectory, step: int) -> list[dict[str, Any]]:
    """The records of `step`. Raises FileNotFoundError if it has none, json.JSONDecodeError if the file was damaged."""
    # Not splitlines(): it would also split at U+2028 and its like, which JSON leaves unescaped inside strings.
    lines = run.rollout_file(step).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def truncate_rollouts_to_step(run: RunDirectory, step: int) -> None:
    """Drop completions of steps after `step`: on resume, those of steps that will be made again."""
    for later in rollout_steps(run):
        if later > step:
            run.rollout_file(later).unlink()
