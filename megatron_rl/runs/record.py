"""A run's record in its folder: who may write it, its configuration, metrics and rollouts, up to the present step.

Where a run stands, as plain values: equal on all ranks, and saved in its checkpoints.

Completions on disk, for people to read: rollouts/step_0000010.jsonl, one JSON object per completion.

A record is what the loop makes of a sample: step, prompt_id, source, prompt, completion, answer, reward, reward_terms,
advantage, finish_reason, num_tokens, weight_version. A file appears whole or not at all, and a resumed run writes the
same names again, so there is nothing to repair besides steps that the resumed run has not reached yet.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from megatron_rl.checkpoint.folders import SCORE, iteration_folder
from megatron_rl.config.errors import UserError
from megatron_rl.config.load import save_config
from megatron_rl.config.schema import Config
from megatron_rl.runs.continuation import changes
from megatron_rl.runs.directory import RunDirectory, lock, write_atomically
from megatron_rl.runs.metrics_log import MetricsLog, finite_or_null
from megatron_rl.runs.progress import say


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


UNWRITTEN = "unwritten_metrics.jsonl"
"""In a checkpoint: rows of metrics that the disk had no room for."""


def open_folder(run: RunDirectory, config: Config) -> IO[str] | None:
    """Make the run's folder and take its lock; rank 0 does, and all ranks learn what keeps it from it. Collective.

    Returns:
        The lock, to be closed at the end of the run; None but on rank 0.

    Raises:
        UserError: another process has the run, the folder is of another run, or it cannot be written.
    """
    held, problem = None, None
    if dist.get_rank() == 0:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            held = lock(run.path)
            if (line := changes(run, config)) is not None:
                say(line)
            run.create()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{run.path}: the run's folder cannot be written: {error}"
    told = [problem]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise UserError(told[0])
    return held


class Record:
    """What rank 0 writes of a run beside its checkpoints."""

    def __init__(self, run: RunDirectory, config: Config, step: int) -> None:
        """Go on with the record of a run that stands after `step`.

        A run that was killed wrote on after its checkpoint; those steps are made again. A run without a checkpoint
        starts anew, and so does its record.
        """
        save_config(config, run.config_file)
        self._run, self._best_metric = run, config.checkpoint.best_metric
        self._log = MetricsLog(
            run,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb_project,
            name=config.name,
            config=asdict(config),
        )
        self.go_back(step if step else -1)
        unwritten = iteration_folder(run.checkpoints_dir, step) / UNWRITTEN
        if unwritten.exists():
            self._log.take_back(unwritten.read_text())

    def append(self, step: int, row: Mapping[str, float]) -> None:
        """A row of metrics at a step."""
        self._log.append(step, row)

    def go_back(self, step: int) -> None:
        """Forget what comes after a step."""
        self._log.truncate_to_step(step)
        truncate_rollouts_to_step(self._run, step)

    def notes(self, row: Mapping[str, float]) -> dict[str, str]:
        """Small files, by name, that a checkpoint of the present step, whose metrics are `row`, takes along.

        What is written so far is put on the disk: the steps before a checkpoint are not made again.
        """
        self._log.position()
        unwritten = {UNWRITTEN: self._log.unwritten} if self._log.unwritten else {}
        return unwritten | _score(self._best_metric, row)

    def close(self) -> None:
        """Nothing is written any more."""
        self._log.close()


def _score(metric: str | None, row: Mapping[str, float]) -> dict[str, str]:
    """The note by which checkpoints are compared: `checkpoint.best_metric`, negated if it begins with '-'."""
    if metric is None:
        return {}
    name, sign = (metric[1:], -1.0) if metric.startswith("-") else (metric, 1.0)
    value = row.get(name, math.nan)
    return {SCORE: json.dumps({"metric": metric, "value": sign * value}) + "\n"} if math.isfinite(value) else {}


@dataclass
class RunState:
    """Changed in place: who holds it sees where the run stands now, also after it has gone back."""

    step: int = 0
    """Steps done. The policy's weight version is the same number."""
    data_position: int = 0
    """Training rows drawn."""
    data_identity: str = ""
    """Of the file that they are of; see `file_identity`."""
    adaptive: dict[str, Any] = field(default_factory=dict)
    """What an algorithm adapts from step to step, as plain values: a KL coefficient, a running baseline."""
    past: dict[str, list[float]] = field(default_factory=dict)
    """Recent values of the metrics that guards watch."""
    rollbacks: int = 0
    """Times that the run has gone back to a checkpoint because of its numbers."""
