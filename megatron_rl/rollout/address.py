"""How an engine's server is reached: host, port and token, and HTTP requests to it.

The token is drawn for one start of one server. It is passed in the environment of the server's process or in a file
that only its owner can read, and in no command line.
"""

import http.client
import json
import socket
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

LOOPBACK = "127.0.0.1"


class EngineLost(RuntimeError):
    """An engine's server has died, does not answer in time, or refuses what is asked."""


@dataclass(frozen=True)
class Address:
    """The address of one start of a server."""

    host: str
    port: int
    token: str = field(repr=False)

    def get(self, path: str, *, timeout_seconds: float) -> Any:
        """Answer to a GET."""
        text = self.get_text(path, timeout_seconds=timeout_seconds)
        return json.loads(text) if text else None

    def get_text(self, path: str, *, timeout_seconds: float) -> str:
        """Answer to a GET, as it is.

        Raises:
            EngineLost: no answer in time, or one that is not 200.
        """
        return self._ask("GET", path, None, timeout_seconds)

    def post(self, path: str, body: Any = None, *, timeout_seconds: float, **query: str) -> Any:
        """Answer to a POST of JSON.

        Raises:
            EngineLost: no answer in time, or one that is not 200.
        """
        text = self._ask("POST", f"{path}?{urlencode(query)}" if query else path, body, timeout_seconds)
        return json.loads(text) if text else None

    def _ask(self, method: str, path: str, body: Any, timeout_seconds: float) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_seconds)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        where = f"engine at {self.host} port {self.port}, {method} {path.partition('?')[0]}"
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
        return text


def address_towards(host: str) -> str:
    """This machine's address on the network by which it reaches another; nothing is sent.

    A server that listens there alone is seen by the job's machines and not on the node's other networks.

    Raises:
        OSError: the host has no address, or no network leads there.
    """
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def free_port_of(host: str) -> int:
    """A port of an address of this machine that nobody listens on at the moment."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
