"""A host and the rank that drives its engine find each other; what the host keeps here answers /health and no more.

It is a process with the token, the parent and the signals of an engine's server, and starts in a tenth of a second.
"""

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from megatron_rl.rollout.address import LOOPBACK, EngineLost, address_towards
from megatron_rl.rollout.hosting import HostedServer, end_hosts, host_engine
from megatron_rl.rollout.server import EngineServer

SERVER = """
import http.server, os, sys
from multiprocessing.shared_memory import SharedMemory
left_behind_if_killed = SharedMemory(f"test_hosting_{os.getpid()}", create=True, size=8)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        right = self.headers["Authorization"] == "Bearer " + os.environ["MEGATRON_RL_ENGINE_TOKEN"]
        self.send_response(200 if right else 401)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode() if right else b"")
host, port = sys.argv[-3], int(sys.argv[-1])
http.server.HTTPServer((host, port), Handler).serve_forever()
"""


class SmallServer(EngineServer):
    def _start(self) -> None:
        self._command = [sys.executable, "-c", SERVER]
        super()._start()


def host(folder: Path) -> None:
    host_engine(0, folder, lambda: SmallServer("", [], log=folder / "server.log"))


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[tuple[Path, HostedServer]]:
    folder = tmp_path / "engines" / "7.0.0"
    process = get_context("spawn").Process(target=host, args=(folder,))
    process.start()
    try:
        yield folder, HostedServer(0, folder)
        end_hosts(folder)
        process.join(20)
        assert process.exitcode == 0
        assert not (folder / "engine_0.json").exists()
        assert list(Path("/dev/shm").glob("test_hosting_*")) == []
    finally:
        process.kill()


def pid(server: HostedServer) -> int:
    return int(server.address.get("/health", timeout_seconds=5))


def segment(server_pid: int) -> Path:
    return Path(f"/dev/shm/test_hosting_{server_pid}")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_dies_or_is_found_lost_is_started_again(hosted: tuple[Path, HostedServer]) -> None:
    folder, server = hosted
    published = folder / "engine_0.json"
    assert stat.S_IMODE(published.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first, token = pid(server), server.address.token
    assert token not in repr(server.address)
    assert token not in Path(f"/proc/{first}/cmdline").read_text()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # Slurm tells all processes of a job
        os.kill(first, number)
    assert pid(server) == first
    assert segment(first).exists()
    os.kill(first, signal.SIGKILL)
    until(lambda: published.exists() and json.loads(published.read_text())["start"] == 1)  # before anybody asks
    with pytest.raises(EngineLost):
        pid(server)
    server.restart()
    second = pid(server)
    assert second != first
    assert not segment(first).exists()
    assert server.address.token != token
    os.kill(second, signal.SIGSTOP)  # only who asks it can know
    server.restart()
    assert pid(server) not in (first, second)
    assert not Path(f"/proc/{second}").exists()
    assert not segment(second).exists()


def test_the_address_on_the_way_to_another_host() -> None:
    assert address_towards(LOOPBACK) == LOOPBACK
    with pytest.raises(OSError, match=r"not known|resolution"):
        address_towards("no-such-host.invalid")
