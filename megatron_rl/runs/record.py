"""A run's record in its folder, which rank 0 keeps up to the present step, and `RunState`.

`RunState` is where a run stands, as plain values: equal on all ranks, and saved in its checkpoints.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import torch.distributed as dist

from megatron_rl.checkpoint.folders import SCORE, iteration_folder
from megatron_rl.config.errors import UserError
from megatron_rl.config.load import save_config
from megatron_rl.config.schema import Config
from megatron_rl.runs.continuation import changes
from megatron_rl.runs.directory import RunDirectory, lock
from megatron_rl.runs.logs import MetricsLog, truncate_rollouts_to_step
from megatron_rl.runs.progress import say

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
