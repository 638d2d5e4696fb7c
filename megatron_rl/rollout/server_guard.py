"""What runs inside an engine's server process beside vLLM: the token check, and the end of the server.

`RequireToken` is middleware before every HTTP endpoint. vLLM asks for its own API key only where completions are made;
the endpoints that pause the engine, replace weights or call methods answer anyone. It also ends the server when the
process that started it has died.

`segments_of` and `remove` clean up the shared memory of a process group that is killed. vLLM's workers share segments
and semaphores in /dev/shm, which only their own regular exit removes. A server is ended with SIGKILL, so without this
a run that restarts engines would fill the memory of its node.

Needs neither vLLM nor torch.
"""

import contextlib
import hmac
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

_SHARED_MEMORY = Path("/dev/shm")


def segments_of(group: int) -> set[Path]:
    """Files directly in /dev/shm that a living process of the group has mapped.

    Args:
        group: id of a process group whose processes share these files with nobody outside of it. Files in folders of
            /dev/shm, where weights travel, are not among them.
    """
    found = set()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # not a process, another user's, or it has just ended
            if os.getpgid(int(process.name)) == group:
                for line in (process / "maps").read_text().splitlines():
                    path = Path(line.partition("/")[1] + line.partition("/")[2])
                    if path.parent == _SHARED_MEMORY:
                        found.add(path)
    return found


def remove(segments: set[Path]) -> None:
    """Remove them. Those that are gone, or cannot be removed, are no matter: the group must end all the same."""
    for path in segments:
        with contextlib.suppress(OSError):
            path.unlink()


TOKEN_VARIABLE = "MEGATRON_RL_ENGINE_TOKEN"
PARENT_VARIABLE = "MEGATRON_RL_ENGINE_PARENT"

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class RequireToken:
    """ASGI middleware: a request without the server's token is answered 401."""

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
