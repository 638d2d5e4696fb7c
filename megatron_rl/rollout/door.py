"""The lock on an engine server's doors, and its end with the process that started it.

vLLM asks for its own API key only where completions are made; the doors that pause, rewrite weights or call methods
answer anyone. This middleware stands before all of them. Imported inside the server; needs neither vLLM nor torch.
"""

import hmac
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_rl.rollout.segments import remove, segments_of

TOKEN_VARIABLE = "MEGATRON_RL_ENGINE_TOKEN"
PARENT_VARIABLE = "MEGATRON_RL_ENGINE_PARENT"

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class RequireToken:
    """ASGI middleware: every request bears the job's token, or is answered 401."""

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        self.app = app
        self._expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()
        threading.Thread(target=_end_with_parent, args=(int(os.environ[PARENT_VARIABLE]),), daemon=True).start()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if scope["type"] == "http" and hmac.compare_digest(given, self._expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"wrong token"})
        else:
            await send({"type": "websocket.close", "code": 1008})


def _end_with_parent(parent: int) -> None:
    """A trainer that was killed cannot end its server."""
    while os.getppid() == parent:
        time.sleep(0.5)
    remove(segments_of(os.getpgrp()))
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the server leads a group of its own, with its workers in it
