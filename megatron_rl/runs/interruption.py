"""When a run saves and stops before its last step: signals, and the end of its Slurm job.

    SIGTERM, SIGUSR1   preemption; `sbatch --signal` before the time limit
    end of the job     rank 0 knows it, and stops the run when another step and a checkpoint may no longer fit

Either is noticed by some ranks only, and at different moments. At the boundary of a step the ranks agree, save, and
leave together.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_STEP_MARGIN = 1.5
"""A step is expected to take up to this many times the slowest so far: lengths of completions drift upwards."""
_EXIT_SECONDS = 10.0
"""For the ranks to end after the last checkpoint."""
_SQUEUE_SECONDS = 30.0


@dataclass(frozen=True)
class Decision:
    """What the ranks do at the boundary of a step.

    Attributes:
        stop: why the run saves and stops, or None.
        save: whether a checkpoint is due by the clock.
    """

    stop: str | None
    save: bool


class Interruption:
    """Notes the signals of this process. One at a time; the process's own handlers come back with `close`."""

    def __init__(self) -> None:
        self._noted: str | None = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = signal.Signals(number).name

    def agreed(self, *, stop: str | None = None, save: bool = False) -> Decision:
        """The decision of all ranks, the same on each; collective.

        Args:
            stop, save: what this rank would do if it has got no signal.
        """
        wishes: list[tuple[str | None, bool]] = [(None, False)] * dist.get_world_size()
        dist.all_gather_object(wishes, (self._noted or stop, save))
        return Decision(next((reason for reason, _ in wishes if reason is not None), None), any(s for _, s in wishes))

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class JobClock:
    """The clock of a run inside its job, on rank 0: does another step fit, is a checkpoint due?"""

    def __init__(
        self, job_end: Callable[[], float | None], *, save_minutes: float | None, clock: Callable[[], float] = time.time
    ) -> None:
        """Args:
        job_end: see `job_end`; asked at the start, and again before a run is stopped: a limit may have been raised.
        save_minutes: see `CheckpointConfig`.
        clock: seconds since the epoch.
        """
        self._job_end, self._save_seconds, self._clock = job_end, save_minutes and 60 * save_minutes, clock
        self._end = job_end()
        self._step_start = self._last_save = clock()
        self._slowest_step = 0.0

    def start_step(self) -> None:
        """A step begins."""
        self._step_start = self._clock()

    def end_step(self) -> None:
        """The step is made; its checkpoint, if it gets one, is not."""
        self._slowest_step = max(self._slowest_step, self._clock() - self._step_start)

    def start_save(self) -> None:
        """A checkpoint is begun."""
        self._last_save = self._clock()

    @property
    def save_is_due(self) -> bool:
        """Whether `checkpoint.save_minutes` have passed since the last checkpoint."""
        return self._save_seconds is not None and self._clock() - self._last_save >= self._save_seconds

    def out_of_time(self, save_seconds: float) -> str | None:
        """Why no further step is begun; None: as slow a step as any so far still fits into the job.

        Args:
            save_seconds: that the last checkpoint may take.
        """
        needed = _STEP_MARGIN * self._slowest_step + save_seconds + _EXIT_SECONDS
        if self._end is None or self._clock() + needed <= self._end:
            return None
        self._end = self._job_end()
        if self._end is None or self._clock() + needed <= self._end:
            return None
        left = max(0.0, self._end - self._clock())
        return f"the job ends in {left:.0f} s, and a step has taken up to {self._slowest_step:.0f} s"


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """When Slurm will end this job, seconds since the epoch; None outside a job, or where its end is not known.

    `squeue` knows a limit that was changed meanwhile; where it cannot be run (in a container), SLURM_JOB_END_TIME tells
    what the limit was at the start.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    command = ["squeue", "--noheader", "--format=%e", "--job", job]
    try:
        environ = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
        said = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=_SQUEUE_SECONDS, check=True
        ).stdout
        return datetime.fromisoformat(said.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # no squeue, a busy controller, 'NONE' without a limit
        told = environment.get("SLURM_JOB_END_TIME", "")
        return float(told) if told.isdecimal() and int(told) > 0 else None


def tell_saved(step: int, environment: Mapping[str, str] = os.environ) -> None:
    """Tell the job script, if there is one, that this attempt has saved: it counts the failures since then."""
    if "MEGATRON_RL_ATTEMPT_LOGS" in environment:
        with contextlib.suppress(OSError):
            Path(environment["MEGATRON_RL_ATTEMPT_LOGS"], "saved").write_text(f"{step}\n")
