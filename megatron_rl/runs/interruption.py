"""Being told to stop: SIGTERM, as preemption sends it, and SIGUSR1, which `sbatch --signal` sends before the time
limit.

A signal may come to some ranks only, and to each at another moment. It is noted; at the next boundary of a step the
ranks agree whether any of them has one, save, and leave together.
"""

import signal
from types import FrameType

import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Notes the signals of this process. One at a time; the process's own handlers come back with `close`."""

    def __init__(self) -> None:
        self._noted: str | None = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = signal.Signals(number).name

    def agreed(self) -> str | None:
        """The signal that some rank has got, the same answer on all ranks; collective."""
        noted: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(noted, self._noted)
        return next((name for name in noted if name is not None), None)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
