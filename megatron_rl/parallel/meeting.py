"""Where ranks wait for each other outside collectives, for as long as any of them makes progress.

A collective ends with an error when a rank comes later than its time limit, whatever keeps that rank; and engines may
generate for longer than any limit that finds a hang in time. So ranks that have nothing to do while others work meet
on the world's store before the next collective: limited is the time *without progress*, and who is missing is named.
"""

import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

_TOLD_SECONDS = 1.0
"""Progress is told to the other ranks at most this often."""


class NoProgressError(RuntimeError):
    """Ranks have waited too long for others that made no progress."""


class Meeting:
    """The meetings of one world, from the view of one rank. Every rank holds one and goes through the same meetings."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        name: str,
        limit_seconds: float,
        on_progress: Callable[[], object] = lambda: None,
        poll_seconds: float = 5.0,
    ) -> None:
        """Args:
        store: that all ranks reach, such as the world's own.
        rank, size: of the world.
        name: of these meetings in the store, the same on every rank and used once.
        limit_seconds: longest wait in which no rank makes progress.
        on_progress: called in a rank that waits when another has made progress, and in one that makes it itself.
        poll_seconds: how often a rank that waits looks for progress.
        """
        self._store = dist.PrefixStore(f"meeting/{name}", store)
        self._rank, self._size, self._limit, self._on_progress = rank, size, limit_seconds, on_progress
        self._poll = timedelta(seconds=poll_seconds)
        self._told_at = float("-inf")
        self._number = 0

    @classmethod
    def of_world(
        cls, name: str, *, limit_seconds: float, on_progress: Callable[[], object] = lambda: None
    ) -> "Meeting":
        """The meetings of torch.distributed's world, on its own store."""
        store = c10d._get_default_store()
        rank, size = dist.get_rank(), dist.get_world_size()
        return cls(store, rank, size, name=name, limit_seconds=limit_seconds, on_progress=on_progress)

    def progressed(self) -> None:
        """This rank has done something that others may be waiting for: a few tokens, one sample, one engine's start."""
        self._on_progress()
        now = time.monotonic()
        if now - self._told_at >= _TOLD_SECONDS:
            self._told_at = now
            self._store.add("progress", 1)

    def wait(self, name: str) -> None:
        """Return when every rank has come here.

        Args:
            name: of what is waited for, in the error.

        Raises:
            NoProgressError: no rank has made progress for `limit_seconds`; it names the ranks that are missing.
        """
        self._number += 1
        key, before = f"{self._number}", f"{self._number - 1}"
        self._store.set(f"{key}/{self._rank}", "")
        if self._number > 1:
            self._store.delete_key(f"{before}/{self._rank}")
        if self._store.add(f"{key}/count", 1) == self._size:
            self._store.set(f"{key}/open", "")
            if self._number > 1:  # all have left the one before, since all have come to this one
                self._store.delete_key(f"{before}/count")
                self._store.delete_key(f"{before}/open")
            return
        progress, since = self._store.add("progress", 0), time.monotonic()
        while not self._opens(f"{key}/open"):
            now, seen = time.monotonic(), self._store.add("progress", 0)
            if seen != progress:
                progress, since = seen, now
                self._on_progress()
            elif now - since > self._limit:
                raise NoProgressError(
                    f"{name}: no rank has made progress for {now - since:.0f} s; waited for {self._missing(key)}"
                )

    def _opens(self, key: str) -> bool:
        """Whether the meeting has begun, after at most `poll_seconds`."""
        try:
            self._store.wait([key], self._poll)
        except RuntimeError:  # not within `poll_seconds`, which kinds of stores say differently; or the store is gone
            return self._store.check([key])
        return True

    def _missing(self, key: str) -> str:
        missing = [str(rank) for rank in range(self._size) if not self._store.check([f"{key}/{rank}"])]
        shown = ", ".join(missing) if len(missing) <= 8 else f"{', '.join(missing[:3])}, ... ({len(missing)})"
        return f"rank {shown}" if len(missing) == 1 else f"ranks {shown}"
