"""How long each phase of a step took, and which one it is in."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Seconds of each named phase since the last `pop`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()
        self.current = ("start", time.time())
        """(the innermost phase, or what lies between; since when, seconds since the epoch); read by other threads."""

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
