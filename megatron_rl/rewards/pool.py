"""Reward functions of the user's own run in processes that can be killed.

A verifier that hangs, eats memory or crashes costs its sample and not the job: its process is ended with everything
that it started, another takes its place, and the sample counts as lost. An exception is different: it is a mistake in
the function, which is told to the user.

The processes are started with the first call, as many as there are calls to make and at most `num_workers`.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.config.functions import Function
from megatron_rl.config.schema import RewardsConfig
from megatron_rl.rewards.worker import write_message

_START_SECONDS = 120.0
"""Limit of a worker's start, which imports the user's module."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    value: Any = None
    """What it returned, if nothing below is set."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Of a `Score`."""
    returned: str | None = None
    """What it returned instead of a number, for a message."""
    raised: str | None = None
    """The exception, in words."""
    error: Exception | None = None
    """The exception itself, where it is at hand."""
    lost: str | None = None
    """Why there is no answer: it took too long, too much memory, or crashed."""


@dataclass
class _Worker:
    process: "subprocess.Popen[bytes]"
    call: int | None = None
    """Number of the call that it makes; None: it starts."""
    deadline: float = 0.0
    answer: bytearray = field(default_factory=bytearray)


class RewardPool:
    """Calls functions in other processes, several at a time."""

    def __init__(self, *, num_workers: int, timeout_s: float, memory_bytes: int) -> None:
        """Args:
        num_workers: processes at most, at least 1.
        timeout_s: limit of a call.
        memory_bytes: limit of a process's data; 0: none.
        """
        self.num_workers, self.timeout_s, self.memory_bytes = num_workers, timeout_s, memory_bytes
        self._idle: list[_Worker] = []

    def call(
        self,
        function: Function,
        samples: Sequence[Mapping[str, Any]],
        on_progress: Callable[[], object] = lambda: None,
    ) -> list[Outcome]:
        """function(**sample) for every sample, in order.

        Args:
            function: importable by name, as a configuration's functions are.
            on_progress: called after every sample.
        """
        outcomes: list[Outcome | None] = [None] * len(samples)
        waiting = deque(range(len(samples)))
        busy: dict[int, _Worker] = {}
        selector = selectors.DefaultSelector()
        try:
            while waiting or any(worker.call is not None for worker in busy.values()):
                while waiting and len(busy) < self.num_workers:
                    worker = self._idle.pop() if self._idle else self._start()
                    assert worker.process.stdout is not None
                    busy[worker.process.stdout.fileno()] = worker
                    selector.register(worker.process.stdout, selectors.EVENT_READ)
                    if worker.answer == b"ready":
                        self._give(worker, waiting.popleft(), function, samples)
                for descriptor in [key.fd for key, _ in selector.select(self._patience(busy))]:
                    worker = busy[descriptor]
                    outcome = self._read(worker)
                    if outcome is None:
                        continue
                    if worker.call is not None:
                        outcomes[worker.call] = outcome
                        on_progress()
                    elif outcome.lost is not None:
                        raise RuntimeError(f"a reward worker does not start: {outcome.lost}")
                    if outcome.lost is None and waiting:
                        self._give(worker, waiting.popleft(), function, samples)
                    else:
                        self._release(selector, busy, descriptor, alive=outcome.lost is None)
                self._end_overdue(selector, busy, outcomes)
        finally:
            for descriptor in list(busy):  # of an interrupted call, or one that starts and is not needed
                self._release(selector, busy, descriptor, alive=False)
            selector.close()
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """End all workers."""
        while self._idle:
            _kill(self._idle.pop())

    def _start(self) -> _Worker:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rl.rewards.worker", str(self.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that what it starts is ended with it
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
        )
        assert process.stdin is not None
        write_message(process.stdin, list(sys.path))  # type: ignore[arg-type]
        return _Worker(process, deadline=time.monotonic() + _START_SECONDS)

    def _give(self, worker: _Worker, call: int, function: Function, samples: Sequence[Mapping[str, Any]]) -> None:
        worker.call, worker.deadline = call, time.monotonic() + self.timeout_s
        worker.answer.clear()
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; its closed pipe says so
            write_message(worker.process.stdin, (function, dict(samples[call])))  # type: ignore[arg-type]

    def _read(self, worker: _Worker) -> Outcome | None:
        """Read what has come; the outcome once it is complete."""
        assert worker.process.stdout is not None
        content = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not content:
            code = worker.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Outcome(lost=f"ended its process ({how})")
        worker.answer += content
        if not worker.answer.endswith(b"\n"):
            return None
        answer = json.loads(bytes(worker.answer))
        if "returned" in answer:
            return Outcome(returned=f"{answer['returned']} ({answer['type']})")
        return Outcome(
            value=answer.get("value"),
            notes=answer.get("notes", {}),
            raised=answer.get("raised"),
            lost=answer.get("lost"),
        )

    def _patience(self, busy: Mapping[int, _Worker]) -> float:
        return max(0.0, min(worker.deadline for worker in busy.values()) - time.monotonic())

    def _end_overdue(
        self, selector: selectors.BaseSelector, busy: dict[int, _Worker], outcomes: list[Outcome | None]
    ) -> None:
        for descriptor, worker in list(busy.items()):
            if time.monotonic() < worker.deadline:
                continue
            if worker.call is None:
                raise RuntimeError(f"a reward worker has not started in {_START_SECONDS:.0f} s")
            outcomes[worker.call] = Outcome(lost=f"took longer than {self.timeout_s:g} s")
            self._release(selector, busy, descriptor, alive=False)

    def _release(
        self, selector: selectors.BaseSelector, busy: dict[int, _Worker], descriptor: int, *, alive: bool
    ) -> None:
        worker = busy.pop(descriptor)
        selector.unregister(descriptor)
        if alive:
            worker.answer[:] = b"ready"
            self._idle.append(worker)
        else:
            _kill(worker)


def build_pool(config: RewardsConfig) -> RewardPool | None:
    """Processes for the user's own reward functions, if they are to have any."""
    if not config.num_workers:
        return None
    memory = int(config.memory_gigabytes * 2**30)
    return RewardPool(num_workers=config.num_workers, timeout_s=config.timeout_seconds, memory_bytes=memory)


def _kill(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    for pipe in (worker.process.stdin, worker.process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
