"""A watchdog in every rank: a run that hangs is ended, and says which rank the others wait for.

A thread of each rank looks every few seconds where the main thread is, and writes it to `logs/ranks/rank_N.json`. When
a phase, or one wait for other ranks, has gone on for its limit without any progress, the rank that notices raises the
alarm by making the folder `logs/hang`. Every rank that still can then writes the stacks of all its threads there; the
one that raised it puts together who waits for whom, and all leave, with one line.

    logs/hang/   hang_report.txt (that line)   rank_N.txt (stacks)

If even this thread cannot run (a call that keeps the interpreter's lock), faulthandler's own clock, which needs no
interpreter, writes the stacks and ends the process.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch.distributed.distributed_c10d as c10d

from megatron_rl.config.errors import EXIT_HANG
from megatron_rl.config.schema import WatchdogConfig
from megatron_rl.runs.diagnosis import RankState, hang_report, read_states, write_state
from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.progress import PhaseTimer

_WAITING_FILES = (
    "torch/distributed/distributed_c10d.py",
    "pipeline_parallel/p2p_communication.py",
    "megatron_rl/parallel/meeting.py",
)
_OUR_FILES = f"{os.sep}megatron_rl{os.sep}"
_BACKSTOP_SECONDS = 300.0
"""Beyond the longest limit, for faulthandler's clock."""


class Watchdog:
    """Watches this rank's main thread, which makes it, until it is closed."""

    def __init__(
        self, config: WatchdogConfig, run: RunDirectory, timer: PhaseTimer, *, rank: int, wait_limit_s: float
    ) -> None:
        """Start watching.

        Args:
            config: the user's.
            run: its logs folder exists.
            timer: says which phase the main thread is in, and when progress was last made in it.
            wait_limit_s: of one wait for other ranks without progress; less than a collective's own limit.
        """
        self.config, self.run, self.timer = config, run, timer
        self.step = 0
        """The step that is being made; set by the trainer."""
        self._wait_limit_s = wait_limit_s
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        now = time.time()
        self._state = RankState(
            rank, os.getpid(), socket.gethostname(), now, 0, "start", now, "", False, now, 0, config.heartbeat_seconds
        )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if config.enabled:
            self._write()
            self._thread.start()

    def close(self, ended: str) -> None:
        """Stop watching and leave behind how the rank ended."""
        if not self.config.enabled:
            return
        self._closed.set()
        self._thread.join(2 * self.config.heartbeat_seconds)
        faulthandler.cancel_dump_traceback_later()
        self._state = replace(self._state, time=time.time(), ended=ended)
        self._write()

    def _watch(self) -> None:
        longest = max(self.config.phase_minutes, *self.config.phase_limits.values(), 0.0) * 60 + _BACKSTOP_SECONDS
        while not self._closed.wait(self.config.heartbeat_seconds):
            faulthandler.dump_traceback_later(longest, exit=True)  # on stderr, if this thread cannot stop it any more
            self._look()
            self._write()
            reason = self._overdue()
            if reason is not None or self.run.hang_dir.exists():
                self._alarm(reason)

    def _look(self) -> None:
        """Note where the main thread is."""
        frame = sys._current_frames().get(self._main or 0)
        place, waits = place_of(frame)
        phase, phase_since = self.timer.current
        count = _num_collectives()
        before = self._state
        same = (before.place, before.phase_since, before.collectives) == (place, phase_since, count)
        now = time.time()
        self._state = replace(
            before,
            time=now,
            step=self.step,
            phase=phase,
            phase_since=phase_since,
            place=place,
            waits=waits,
            place_since=before.place_since if same else now,
            collectives=count,
        )

    def _overdue(self) -> str | None:
        """Which limit is exceeded."""
        state, progressed_at = self._state, self.timer.progressed_at
        minutes = self.config.phase_limits.get(state.phase, self.config.phase_minutes)
        if state.time - max(state.phase_since, progressed_at) > minutes * 60:
            return f"phase {state.phase} has made no progress for its limit of {minutes:g} minutes"
        if state.waits and state.time - max(state.place_since, progressed_at) > self._wait_limit_s:
            return f"other ranks have been waited for without progress for more than {self._wait_limit_s:.0f} s"
        return None

    def _alarm(self, reason: str | None) -> None:
        """Write this rank's stacks, write or read the hang report, and end the process."""
        folder = self.run.hang_dir
        leads = False
        with contextlib.suppress(OSError):
            if reason is not None and not folder.exists():
                folder.mkdir()
                leads = True
        with contextlib.suppress(OSError), (folder / f"rank_{self._state.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        line = self._write_hang_report(folder, reason) if leads else self._read_hang_report(folder)
        print(f"megatron-rl: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT_HANG)  # the main thread cannot be made to return

    def _write_hang_report(self, folder: Path, reason: str | None) -> str:
        time.sleep(2 * self.config.heartbeat_seconds + 1)  # the others see the alarm at their next look
        self._state = replace(self._state, time=time.time())
        self._write()
        line = f"{hang_report(read_states(self.run.ranks_dir))}; {reason}; stacks are in {folder}"
        with contextlib.suppress(OSError):
            partial = folder / ".hang_report.partial"
            partial.write_text(line + "\n")
            partial.replace(folder / "hang_report.txt")
        return line

    def _read_hang_report(self, folder: Path) -> str:
        deadline = time.monotonic() + 6 * self.config.heartbeat_seconds + 10
        while time.monotonic() < deadline:
            self._state = replace(self._state, time=time.time())
            self._write()
            with contextlib.suppress(OSError):
                return (folder / "hang_report.txt").read_text().strip()
            time.sleep(min(1.0, self.config.heartbeat_seconds))
        return f"{hang_report(read_states(self.run.ranks_dir))}; another rank raised the alarm; stacks are in {folder}"

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is the checkpoint's business
            write_state(self.run.ranks_dir, self._state)


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """('function (file:line)', whether it is a wait in a collective) of the innermost frame given.

    For a wait, the function is the collective as it was called, and the place is who of this package called it.
    """
    innermost, collective, caller = frame, None, None
    while frame is not None:
        if frame.f_code.co_filename.endswith(_WAITING_FILES):
            collective, caller = frame.f_code.co_name, None
        elif caller is None and _OUR_FILES in frame.f_code.co_filename:
            caller = frame
        frame = frame.f_back
    if innermost is None:
        return "", False
    if collective is not None:
        return f"{collective} ({_line(caller)})" if caller else collective, True
    inside = innermost if caller is None or caller is innermost else None
    at = f"{innermost.f_code.co_name} ({_line(innermost)})"
    return at if inside else f"{at} from {caller.f_code.co_name} ({_line(caller)})" if caller else at, False


def _line(frame: FrameType | None) -> str:
    assert frame is not None
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


def _num_collectives() -> int:
    """Collectives that this rank has entered, over all its groups."""
    total = 0
    for group in list(c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            count: int = getattr(group, "_get_sequence_number_for_group")()  # noqa: B009 - torch's types lack it
            total += count
    return total
