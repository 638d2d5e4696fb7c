"""vLLM servers as child processes: `EngineServer` (started, watched, restarted, ended) and `RewardServer` (scores).

A server listens on one address of this machine and answers only requests with the token that was drawn for this start
(`server_guard.py`). Slurm sends its stop signal to every process of a job, and ranks need the engine to finish their
step: so the server blocks these signals, and ends when its parent ends it or has died.

`RewardServer` is a reward model in such a server: token ids in, scores out. It serves a *ForSequenceClassification or
*ForTokenClassification of one label with vLLM's pooling runner. Its weights never change, so no weights are sent to it.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_rl.rollout.address import LOOPBACK, Address, EngineLost, free_port_of
from megatron_rl.rollout.server_guard import PARENT_VARIABLE, TOKEN_VARIABLE, remove, segments_of

_MIDDLEWARE = "megatron_rl.rollout.server_guard.RequireToken"
_WORKER_EXTENSION = "megatron_rl.rollout.worker_extension.WeightSyncExtension"
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING")
_POLL_SECONDS = 0.1


class EngineServer:
    """A vLLM server, child of this process."""

    address: Address
    process: "subprocess.Popen[bytes]"
    _segments: set[Path]

    def __init__(
        self,
        model_path: str | Path,
        arguments: Sequence[str],
        *,
        log: Path,
        host: str = LOOPBACK,
        devices: Sequence[str] | None = None,
        start_seconds: float = 600.0,
    ) -> None:
        """Start it; `ready` waits until it answers.

        Args:
            model_path: folder of a Hugging Face checkpoint.
            arguments: of vLLM's server, besides those decided here; see `remote.server_arguments`.
            log: file that its output is appended to.
            host: address of this machine to listen on.
            devices: GPUs that it sees; None: those that this process does.
            start_seconds: limit of its start.
        """
        self.log, self._host, self._devices, self.start_seconds = log, host, devices, start_seconds
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_path)]
        self._command += ["--uvicorn-log-level", "warning", "--middleware", _MIDDLEWARE]
        self._command += ["--worker-extension-cls", _WORKER_EXTENSION, *arguments]
        self._start()

    def _start(self) -> None:
        self._segments = set()
        self.address = Address(self._host, free_port_of(self._host), secrets.token_urlsafe(32))
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        environment |= {
            TOKEN_VARIABLE: self.address.token,
            PARENT_VARIABLE: str(os.getpid()),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_NO_USAGE_STATS": "1",
            # On a CPU vLLM would want a memory node for each of its ranks, and bind all engines to the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        }
        if self._devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices)
        command = [*self._command, "--host", self._host, "--port", str(self.address.port)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output, _stop_signals_blocked():
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )

    def ready(self, on_progress: Callable[[], object] = lambda: None) -> None:
        """Wait until the server answers.

        Args:
            on_progress: called now and then while it starts.

        Raises:
            EngineLost: it ended, or took too long; the end of its log is in the message. Nothing of it is left.
        """
        deadline = time.monotonic() + self.start_seconds
        while True:
            try:
                self.address.get("/health", timeout_seconds=5)
                self._segments = segments_of(self.process.pid)  # while it lives: it may be found dead
                return
            except EngineLost:
                code = self.process.poll()
                if code is not None or time.monotonic() > deadline:
                    self.end()
                    end = self.log.read_text(errors="replace")[-2000:]
                    raise EngineLost(f"the engine did not start (exit code {code}): {end}") from None
                on_progress()
                time.sleep(_POLL_SECONDS)

    def restart(self, on_progress: Callable[[], object] = lambda: None) -> None:
        """End what is left of it and start it again, at another port, with another token.

        Raises:
            EngineLost: see `ready`.
        """
        self.end()
        self._start()
        self.ready(on_progress)

    def end(self) -> None:
        """End the server with all that it started, also if it is stopped, and remove the shared memory it leaves."""
        self._segments |= segments_of(self.process.pid)
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        remove(self._segments)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """What is started in here inherits the mask, and with it what it starts; vLLM sets handlers, never the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_REQUEST_SECONDS = 600.0
_SEQUENCES = 1024
"""Of one request."""


class RewardServer:
    """A reward model's server, and this rank's client of it."""

    def __init__(
        self, model_path: str, arguments: Sequence[str], *, per_token: bool, log: Path, start_seconds: float = 600.0
    ) -> None:
        """Start it and wait until it answers.

        Args:
            model_path: folder of a Hugging Face classifier of one label.
            arguments: of vLLM's server: dtype, longest sequence.
            per_token: a score of every token, of a *ForTokenClassification; else one of the last.
            log: file for its output.
            start_seconds: limit of its start.

        Raises:
            EngineLost: it did not start; the end of its log is in the message.
        """
        self._task = "token_classify" if per_token else "classify"
        pooling = ["--runner", "pooling", "--convert", "classify"]
        self.server = EngineServer(model_path, [*pooling, *arguments], log=log, start_seconds=start_seconds)
        self.server.ready()

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of token ids: the score of the last token, [1], or of every one, [tokens]; float32, as the head gives it.

        Raises:
            EngineLost: the server is dead, or does not answer in time.
        """
        found: list[np.ndarray] = []
        for start in range(0, len(sequences), _SEQUENCES):
            body = {
                "input": [list(map(int, ids)) for ids in sequences[start : start + _SEQUENCES]],
                "task": self._task,
                "use_activation": False,
                "encoding_format": "float",
            }
            answer = self.server.address.post("/pooling", body, timeout_seconds=_REQUEST_SECONDS)
            of_request = sorted(answer["data"], key=lambda item: item["index"])
            found += [np.asarray(item["data"], dtype=np.float32).reshape(-1) for item in of_request]
        return found

    def shutdown(self) -> None:
        """End it."""
        self.server.end()
