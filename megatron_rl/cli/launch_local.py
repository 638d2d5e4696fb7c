"""Start the ranks of a layout on this machine, and end with them.

    launcher -+- rank 0      (terminal)          each rank leads a session and process group of its own, which is
              +- rank 1..N   (<logs>/rank_N.log)   signalled as a whole, with whatever the rank itself started
              +- guard       kills all groups if the launcher vanishes

If one rank fails the others are ended, since they would wait for it, and its error is shown last. A first SIGINT,
SIGTERM or SIGUSR1 is passed on and the ranks decide (a trainer saves); a second one ends them. Whatever ends the
launcher ends the ranks: the guard reads a pipe that only the launcher holds open, so that even SIGKILL cannot leave
ranks behind.

A rank that has ended stays a zombie until all have: its process id, which is also its group's, is not given away
while a signal may still be sent to it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_rl.cli.rank_environment import free_port, rank_of_this_machine
from megatron_rl.config.errors import EXIT_HANG, EXIT_RESUME

GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL."""
_POLL_SECONDS = 0.02
_SAID_IN_ONE_LINE = (2, EXIT_HANG)
"""Exit codes of a user's mistake and of a watchdog."""
_SHOWN_BYTES = 8192

# Reads a group id per line until the launcher has closed the pipe, by whatever end, then kills the groups.
_GUARD = """
import os, signal, sys
for group in [int(line) for line in sys.stdin]:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def launch(command: Sequence[str], *, num_ranks: int, logs: Path) -> int:
    """Run `command` as `num_ranks` ranks and wait for them.

    Args:
        command: argument list of a rank; it finds its place in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
        num_ranks: at least 1.
        logs: folder, made if missing, for rank_N.log of the ranks N > 0; appended to.

    Returns:
        0, or the exit code of the rank that failed first; 128 + signal if a signal ended it, as shells have it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ranks = _Ranks(logs)
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    previous = {number: signal.signal(number, ranks.on_signal) for number in stops}
    try:
        ranks.start(command, num_ranks)
        failed = ranks.wait()
    finally:
        ranks.end()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return ranks.outcome(failed)


class _Ranks:
    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.log_starts: dict[int, int] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.exit_codes: dict[int, int] = {}
        self.signals: list[int] = []
        self.guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; `wait` acts on it, so that ranks which are still being started get it too."""
        self.signals.append(number)

    def start(self, command: Sequence[str], num_ranks: int) -> None:
        """Start every rank, rank 0 on this terminal and the others into their logs."""
        num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
        environment = {"OMP_NUM_THREADS": str(num_threads), **os.environ}
        master_port = free_port()
        for rank in range(num_ranks):
            place = rank_of_this_machine(rank, num_ranks, master_port)
            with contextlib.ExitStack() as stack:
                output = stack.enter_context(self._log(rank).open("ab")) if rank > 0 else None
                self.log_starts[rank] = output.tell() if output else 0
                process = subprocess.Popen(
                    command,
                    env=environment | place,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            self.processes.append(process)
            assert self.guard.stdin is not None
            self.guard.stdin.write(f"{process.pid}\n".encode())

    def wait(self) -> int | None:
        """The rank that failed first; None once all have ended well, or a second signal came."""
        num_passed_on = 0
        while self._running() and len(self.signals) < 2:
            if len(self.signals) > num_passed_on:
                self._signal_all(self._stop_signal())
                num_passed_on = 1
            for rank in self._newly_ended():
                if self.exit_codes[rank]:
                    self._let_rank_0_speak(rank)
                    return rank
            time.sleep(_POLL_SECONDS)
        return None

    def _let_rank_0_speak(self, failed: int) -> None:
        """What is said in one line is usually said by all ranks: rank 0 says it here, unless it is ended before."""
        deadline = time.monotonic() + GRACE_SECONDS
        while self.exit_codes[failed] in _SAID_IN_ONE_LINE and 0 not in self.exit_codes and time.monotonic() < deadline:
            self._newly_ended()
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """End what still runs, politely first, with everything that the ranks started; then the guard."""
        if self._running():
            self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while self._running() and time.monotonic() < deadline:
            self._newly_ended()
            time.sleep(_POLL_SECONDS)
        self._signal_all(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.guard.kill()
        self.guard.communicate()

    def outcome(self, failed: int | None) -> int:
        """The exit code, after showing the error of the rank that failed first."""
        stopped = 128 + self._stop_signal() if self.signals else None
        if failed is None:
            return stopped if stopped and len(self.signals) > 1 else 0
        code = self.exit_codes[failed]
        shell_code = code if code >= 0 else 128 - code
        if shell_code not in (stopped, EXIT_RESUME):  # a run that has saved its state has said so
            self._show_error(failed, code)
        return shell_code

    def _show_error(self, failed: int, code: int) -> None:
        how = f"failed first, with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        if failed == 0:
            # An exception (1), a user's mistake (2) or a hang that rank 0 has named is on the terminal already.
            if code not in (1, *_SAID_IN_ONE_LINE):
                print(f"megatron-rl: rank 0 {how}", file=sys.stderr)
            return
        text = _end_of(self._log(failed), self.log_starts[failed])
        if code not in _SAID_IN_ONE_LINE:
            print(f"megatron-rl: rank {failed} {how}; the end of {self._log(failed)}:", text, sep="\n", file=sys.stderr)
        elif self.exit_codes.get(0) != code:  # else rank 0 has said the same
            print(text.rpartition("\n")[2], file=sys.stderr)

    def _newly_ended(self) -> list[int]:
        """Ranks that have ended since the last call; their exit codes are noted, their process ids kept."""
        ended = []
        for rank in self._running():
            status = os.waitid(os.P_PID, self.processes[rank].pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None:
                exited = status.si_code == os.CLD_EXITED
                self.exit_codes[rank] = status.si_status if exited else -status.si_status
                ended.append(rank)
        return ended

    def _running(self) -> list[int]:
        return [rank for rank in range(len(self.processes)) if rank not in self.exit_codes]

    def _stop_signal(self) -> int:
        """The first signal that came, as ranks get it: a closed terminal ends them as Slurm would."""
        return signal.SIGTERM if self.signals[0] == signal.SIGHUP else self.signals[0]

    def _signal_all(self, number: int) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue  # only a zombie is left of the group

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"


def _end_of(log: Path, start: int) -> str:
    """The end of a log since `start`: from its first traceback on, causes included, or else the last lines."""
    with log.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(start, size - _SHOWN_BYTES))
        text = stream.read().decode(errors="replace").rstrip()
    _, header, traceback = text.partition("Traceback (most recent call last):")
    return header + traceback if header else "\n".join(text.splitlines()[-20:])
