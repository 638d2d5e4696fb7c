"""Servers that other tasks of a job host on their own nodes: host and rank find each other through files.

    <folder>/engine_N.json   where start K of the server listens, and its token; only its owner can read it
    <folder>/engine_N.lost   K: the rank that drives the engine has found start K dead or frozen
    <folder>/ranks_ended     a rank has ended, and so do the hosts

    host    start -> publish -> watch: has it died, or been found lost? -> start again, under K + 1
    rank    wait for K -> use it; lost: ask for K + 1, wait for it, and bring it to the present version

A run ends with any of its ranks. The folder belongs to one attempt of one job, so nothing of an earlier one is ever
found. A host that cannot start its server, or is lost itself, ends the job's step; the job script starts all tasks
again.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_rl.rollout.address import Address, EngineLost
from megatron_rl.rollout.server import EngineServer

FOLDER_VARIABLE = "MEGATRON_RL_ENGINES"
"""In a rank's environment: the folder, where engines have hosts."""

_ENDED = "ranks_ended"
_POLL_SECONDS = 0.25


def host_engine(number: int, folder: Path, start: Callable[[], EngineServer]) -> None:
    """Keep engine `number` alive until the ranks have ended. SIGTERM and SIGUSR1 are for the ranks.

    Args:
        number: of the engine.
        folder: of this attempt; made if missing.
        start: starts its server.

    Raises:
        EngineLost: it does not start.
    """
    for ignored in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    files = _Files(folder, number)
    count, server = 0, start()
    try:
        server.ready()
        files.publish(count, server.address)
        while not (folder / _ENDED).exists():
            died = server.process.poll()
            if died is not None or files.lost_start() >= count:
                how = "does not answer" if died is None else f"has ended ({died})"
                print(f"megatron-rl: engine {number} {how}; it is started again", flush=True)
                server.restart()
                count += 1
                files.publish(count, server.address)
            time.sleep(_POLL_SECONDS)
    finally:
        files.address.unlink(missing_ok=True)
        server.end()


def end_hosts(folder: Path) -> None:
    """Tell all hosts that the ranks have ended."""
    with contextlib.suppress(OSError):  # then they end with the job
        (folder / _ENDED).touch(mode=0o600)


class HostedServer:
    """A rank's client of a server that a host runs."""

    def __init__(
        self,
        number: int,
        folder: Path,
        *,
        start_seconds: float = 600.0,
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        """Wait until the host has started it.

        Args:
            number, folder: see `host_engine`.
            start_seconds: limit of one start.
            on_progress: called now and then while it is waited for.

        Raises:
            EngineLost: it takes too long.
        """
        self._number, self._folder, self._files = number, folder, _Files(folder, number)
        # The host may have begun a start just before it is asked for another.
        self._wait_seconds, self._on_progress = 2 * start_seconds, on_progress
        self._start, self.address = self._wait_for(0)

    def restart(self, on_progress: Callable[[], object] = lambda: None) -> None:
        """Have the host end this start of the server, if it has not, and wait for the next one.

        Raises:
            EngineLost: it takes too long.
        """
        self._on_progress = on_progress
        self._files.lose(self._start)
        self._start, self.address = self._wait_for(self._start + 1)

    def end(self) -> None:
        """Tell all hosts that engines are not needed any more."""
        end_hosts(self._folder)

    def _wait_for(self, start: int) -> tuple[int, Address]:
        deadline = time.monotonic() + self._wait_seconds
        while (found := self._files.published()) is None or found[0] < start:
            if time.monotonic() > deadline:
                raise EngineLost(
                    f"engine {self._number}: its host has not started it within {self._wait_seconds:.0f} s; "
                    f"{self._files.address} does not have start {start}"
                )
            self._on_progress()
            time.sleep(_POLL_SECONDS)
        return found


class _Files:
    def __init__(self, folder: Path, number: int) -> None:
        self.address, self.lost = (folder / f"engine_{number}.{end}" for end in ("json", "lost"))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def publish(self, start: int, address: Address) -> None:
        _write_privately(self.address, json.dumps({"start": start, **asdict(address)}))

    def published(self) -> tuple[int, Address] | None:
        try:
            published = json.loads(self.address.read_text())
        except FileNotFoundError:
            return None
        return published.pop("start"), Address(**published)

    def lose(self, start: int) -> None:
        _write_privately(self.lost, str(start))

    def lost_start(self) -> int:
        try:
            return int(self.lost.read_text())
        except FileNotFoundError:
            return -1


def _write_privately(file: Path, text: str) -> None:
    """Write a file wholly or not at all, readable to its owner alone from its first byte on."""
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    partial.replace(file)
