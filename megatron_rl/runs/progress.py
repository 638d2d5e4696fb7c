"""Progress of a run on the terminal or in its log file, and how long each phase of a step took.

On a terminal this is tqdm's bar. In a file (sbatch, a pipe) carriage returns would make one endless line, so there it
prints plain lines, few enough to read: one for the first unit and the last, and between them one when ten seconds have
passed, or when another tenth of the work is done and a second has passed.

    with Progress(num_steps, "train", enabled=rank == 0, initial=first_step) as progress:
        for step in ...:
            with progress.nested(num_completions, "generate") as generation:
                generation.update(8)
            progress.update(reward=0.51, loss=-0.02)
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
SHORTEST_SECONDS_BETWEEN_LINES = 1.0


class Progress:
    """How much of `total` is done, when the rest will be, and a few numbers."""

    def __init__(
        self,
        total: int,
        description: str,
        enabled: bool,
        initial: int = 0,
        *,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        depth: int = 0,
    ) -> None:
        """
        Args:
            total: units of work in all, those done before a resume included.
            description: what is going on, one or two words.
            enabled: False shows nothing: ranks other than 0, or `logging.progress: false`.
            initial: units done before; they do not count for the speed.
            file: where to; None: standard error.
            clock: seconds, from anywhere on.
            depth: 0 for the run's own bar, 1 for one inside a step, which vanishes when it is done.
        """
        self._file = file or sys.stderr
        self._clock, self._depth, self._enabled = clock, depth, enabled
        self._shown: dict[str, float] = {}
        self._bar: tqdm | None = None
        self._lines: _Lines | None = None
        if enabled and _is_terminal(self._file):
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                file=self._file,
                dynamic_ncols=True,
                leave=depth == 0,
                position=depth,
                smoothing=0.1,
            )
        elif enabled:
            self._lines = _Lines(total, description, initial, self._file, clock, detail=depth > 0)

    def update(self, n: int = 1, **shown: float) -> None:
        """`n` more units are done. `shown` numbers replace those of the same name, to four digits."""
        if not self._enabled:
            return
        self._shown |= shown
        if self._bar is not None:
            if shown:
                self._bar.set_postfix_str(numbers(self._shown), refresh=False)
            self._bar.update(n)
        elif self._lines is not None:
            self._lines.update(n, self._shown)

    def nested(self, total: int, description: str) -> "Progress":
        """A bar for the work inside one unit, such as the completions of a step."""
        return Progress(total, description, self._enabled, file=self._file, clock=self._clock, depth=self._depth + 1)

    def write(self, line: str) -> None:
        """Print `line` above the bar, where it does not break it."""
        if self._bar is not None:
            tqdm.write(line, file=self._file)
        elif self._enabled:
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """Leave the bar as it is; of a nested one nothing stays."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Lines:
    """Progress as plain lines."""

    def __init__(
        self, total: int, description: str, initial: int, file: TextIO, clock: Callable[[], float], *, detail: bool
    ) -> None:
        self._total, self._description, self._initial, self._file, self._clock = (
            total,
            description,
            initial,
            file,
            clock,
        )
        self._detail = detail
        self._done = self._printed_done = initial
        self._start = self._printed_at = clock()

    def update(self, n: int, shown: dict[str, float]) -> None:
        self._done += n
        now = self._clock()
        waited = now - self._printed_at
        if waited >= SECONDS_BETWEEN_LINES or (not self._detail and self._is_news(waited)):
            self._print(now, shown)

    def _is_news(self, waited: float) -> bool:
        """The first unit, the last one, and every tenth of the work are news. Work inside a step has no news."""
        if self._done >= self._total or self._printed_done == self._initial:
            return True
        another_tenth = 10 * self._done // self._total > 10 * self._printed_done // self._total
        return another_tenth and waited >= SHORTEST_SECONDS_BETWEEN_LINES

    def _print(self, now: float, shown: dict[str, float]) -> None:
        elapsed = now - self._start
        done_here = self._done - self._initial
        left = elapsed / done_here * max(0, self._total - self._done) if done_here else 0.0
        words = [
            f"{self._description} {self._done}/{self._total} ({100 * self._done // max(1, self._total)}%)",
            f"{tqdm.format_interval(elapsed)} elapsed, {tqdm.format_interval(left)} left",
        ]
        if shown:
            words.append(numbers(shown))
        print("   ".join(words), file=self._file, flush=True)
        self._printed_at, self._printed_done = now, self._done


def say(message: str) -> None:
    """A line about the run to its user."""
    print(f"megatron-rl: {message}", file=sys.stderr, flush=True)


def _is_terminal(file: TextIO) -> bool:
    """Whether a bar can be drawn there. Of a terminal of unknown, that is zero, width tqdm would show nothing."""
    return file.isatty() and os.get_terminal_size(file.fileno()).columns > 0


def numbers(shown: dict[str, float]) -> str:
    """'reward 0.5123, loss -0.02': names and four significant digits."""
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


class PhaseTimer:
    """Seconds of each named phase since the last `pop`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()
        self.current = ("start", time.time())
        """(the innermost phase, or what lies between; since when, seconds since the epoch); read by other threads."""
        self.progressed_at = time.time()
        """When this rank, or one that it waits for, last made progress inside a phase; read by other threads."""

    def progressed(self) -> None:
        """Something of the present phase is done."""
        self.progressed_at = time.time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the context to `name`."""
        start = time.perf_counter()
        outer, self.current = self.current[0], (name, time.time())
        try:
            yield
        finally:
            self.current = ("between phases" if outer == "start" else outer, time.time())
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """`timing_s/<phase>` of each phase and `timing_s/step` since the last call, in seconds."""
        now = time.perf_counter()
        timings = {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}
        timings["timing_s/step"] = now - self._start
        self._seconds, self._start = {}, now
        return timings
