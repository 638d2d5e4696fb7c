"""vLLM's server as a process of its own: started, asked, and ended by the rank that drives it.

It listens on the loopback address and answers only requests with the token that was drawn for it (`door.py`).
"""

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from megatron_rl.rollout.door import PARENT_VARIABLE, TOKEN_VARIABLE

_MIDDLEWARE = "megatron_rl.rollout.door.RequireToken"
_WORKER_EXTENSION = "megatron_rl.rollout.worker_doors.WeightDoors"
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING")
_POLL_SECONDS = 0.1


class EngineLost(RuntimeError):
    """An engine's server has died, does not answer in time, or refuses what is asked."""


class EngineServer:
    """A vLLM server."""

    def __init__(self, model_path: str, arguments: Sequence[str], *, log: Path) -> None:
        """Start it; `ready` waits until it answers.

        Args:
            model_path: folder of a Hugging Face checkpoint.
            arguments: of vLLM's server, besides those decided here.
            log: file that its output is appended to.
        """
        self.log = log
        self.token = secrets.token_urlsafe(32)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        environment |= {
            TOKEN_VARIABLE: self.token,
            PARENT_VARIABLE: str(os.getpid()),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--uvicorn-log-level", "warning"]
        command += ["--middleware", _MIDDLEWARE, "--worker-extension-cls", _WORKER_EXTENSION, *arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )

    def ready(self, timeout_seconds: float) -> None:
        """Wait until the server answers.

        Raises:
            EngineLost: it ended, or took too long; the end of its log is in the message.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                self.get("/health", timeout_seconds=5)
                return
            except EngineLost:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    code, end = self.process.poll(), self.log.read_text(errors="replace")[-2000:]
                    raise EngineLost(f"the engine did not start (exit code {code}): {end}") from None
                time.sleep(_POLL_SECONDS)

    def get(self, path: str, *, timeout_seconds: float) -> Any:
        """Answer to a GET."""
        return self._ask("GET", path, None, timeout_seconds)

    def post(self, path: str, body: Any = None, *, timeout_seconds: float, **query: str) -> Any:
        """Answer to a POST of JSON.

        Raises:
            EngineLost: no answer in time, or one that is not 200.
        """
        return self._ask("POST", f"{path}?{urlencode(query)}" if query else path, body, timeout_seconds)

    def _ask(self, method: str, path: str, body: Any, timeout_seconds: float) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_seconds)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        where = f"engine at port {self.port}, {method} {path.partition('?')[0]}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except TimeoutError:
            raise EngineLost(f"{where}: no answer within {timeout_seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineLost(f"{where}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise EngineLost(f"{where}: answered {response.status}: {text[:300]}")
        return json.loads(text) if text else None

    def kill(self) -> None:
        """End the server with all that it started, also if it is stopped."""
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
