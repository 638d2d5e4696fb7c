"""A plan carried out over TCP by threads, and every fault that can happen: a clear error, soon.

The same plan as in `test_exchange.py`: rank 0 sends, ranks 1 and 2 receive.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.transport.exchange import Exchange, Transport, verified
from megatron_rl.weights.transport.messages import TransferError, checksum
from megatron_rl.weights.transport.sockets import Endpoint, Listener, SocketTransport, connect
from tests.unit.weights.transport.test_exchange import Memory, parameters, plan

HOST, TOKEN = "127.0.0.1", "token of this job"
RECEIVERS = (1, 2)


class Ends:
    """A sender and two receivers that keep their state from round to round."""

    def __init__(self, *, max_changed: float = 0.0, timeout: float = 10.0) -> None:
        whole = plan()
        self.rank_plans = {rank: RankPlan.of(whole, rank, {}) for rank in (0, *RECEIVERS)}
        self.exchanges = {
            rank: Exchange(rank_plan, max_changed=max_changed) for rank, rank_plan in self.rank_plans.items()
        }
        self.memories = {rank: Memory(self.rank_plans[rank]) for rank in RECEIVERS}
        self.listeners = {rank: Listener(HOST) for rank in RECEIVERS}
        self.endpoints = {rank: Endpoint(HOST, listener.port, TOKEN) for rank, listener in self.listeners.items()}
        self.timeout = timeout

    def receive(self, rank: int, name: str, version: int) -> None:
        transport = self.listeners[rank].accept(
            self.rank_plans[rank].senders, rank=rank, round=name, token=TOKEN, timeout_seconds=self.timeout
        )
        self.run(rank, transport, {}, self.memories[rank], version)

    def send(self, name: str, version: int, held: dict[str, Tensor]) -> None:
        transport = connect(self.endpoints, rank=0, round=name, timeout_seconds=self.timeout)
        self.run(0, transport, held, None, version)

    def run(
        self, rank: int, transport: SocketTransport, held: dict[str, Tensor], memory: Memory | None, version: int
    ) -> None:
        try:
            check = verified("full", version)
            self.exchanges[rank].run(held, memory, transport, version=version, verify=check)
        finally:
            transport.close()

    def round(
        self,
        version: int,
        held: dict[str, Tensor],
        *,
        name: str = "",
        names: dict[int, str] | None = None,
        versions: dict[int, int] | None = None,
    ) -> dict[int, str]:
        """What each rank says went wrong."""
        names, versions = names or {}, versions or {}
        name = name or f"round {version}"
        with ThreadPoolExecutor(3) as pool:
            futures = {
                rank: pool.submit(self.receive, rank, names.get(rank, name), versions.get(rank, version))
                for rank in RECEIVERS
            }
            futures[0] = pool.submit(self.send, names.get(0, name), version, held)
            return {rank: str(error) for rank, f in futures.items() if (error := f.exception()) is not None}

    def holds(self, held: dict[str, Tensor]) -> bool:
        """Whether the receivers hold what a first synchronisation of `held` brings."""
        fresh = Ends()
        assert fresh.round(1, held) == {}
        return all(
            torch.equal(self.memories[rank].tensors[name], tensor)
            for rank in RECEIVERS
            for name, tensor in fresh.memories[rank].tensors.items()
        )


def test_two_ranks_get_their_shards_and_their_checksums() -> None:
    held, ends = parameters(), Ends()
    assert ends.round(1, held) == {}
    embedding = torch.zeros(128, 6)
    embedding[:70] = held["embedding.word_embeddings.weight"]
    for t, rank in enumerate(RECEIVERS):
        memory = ends.memories[rank]
        assert torch.equal(memory.tensors["model.embed_tokens.weight"], embedding[64 * t : 64 * (t + 1)])
        assert memory.sums == {name: checksum(tensor) for name, tensor in memory.tensors.items()}


def test_changed_elements_alone_travel_and_a_new_receiver_gets_everything() -> None:
    held, ends = parameters(), Ends(max_changed=0.2)
    assert ends.round(1, held) == {}
    everything = ends.exchanges[0].sent_bytes
    held["fc1.weight"][2, 3] += 1
    held["embedding.word_embeddings.weight"][69] -= 1
    ends.memories = {rank: Memory(ends.rank_plans[rank]) for rank in RECEIVERS}  # as vLLM forgets what it prepared
    assert ends.round(2, held) == {}
    assert ends.holds(held)
    assert ends.exchanges[0].sent_bytes < everything
    # Rank 2 is started anew: it refuses, and after that all begin again.
    ends.exchanges[2] = Exchange(ends.rank_plans[2], max_changed=0.2)
    held["fc1.weight"][0, 0] += 1
    failures = ends.round(3, held)
    assert "changes since version 2, and the engine's rank holds nothing" in failures[2]
    ends.exchanges[0].forget()
    ends.memories = {rank: Memory(ends.rank_plans[rank]) for rank in RECEIVERS}
    assert ends.round(3, held, name="again") == {}
    assert ends.exchanges[0].sent_bytes == everything
    assert ends.holds(held)


def test_a_wrong_token_is_refused_and_does_not_spoil_the_round() -> None:
    ends = Ends(timeout=5.0)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(ends.receive, rank, "round 1", 1) for rank in RECEIVERS]
        guessed = {rank: endpoint._replace(token="guessed") for rank, endpoint in ends.endpoints.items()}
        with pytest.raises(TransferError, match=r"to rank 1 at 127.0.0.1:\d+: refused: the token or the round"):
            connect(guessed, rank=0, round="round 1", timeout_seconds=5)
        with socket.create_connection((HOST, ends.endpoints[2].port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 40)
        ends.send("round 1", 1, parameters())
        assert [future.exception() for future in futures] == [None, None]
    assert ends.holds(parameters())


def test_a_sender_of_an_earlier_round_is_refused() -> None:
    failures = Ends(timeout=1.0).round(2, parameters(), names={0: "round 1"})
    assert "refused: the token or the round is another" in failures[0]
    assert failures[1] == "weights for rank 1: no connection from rank 0 within 1 s"


def test_another_version_is_refused_by_the_rank_that_expects_it() -> None:
    failures = Ends(timeout=5.0).round(7, parameters(), versions={2: 8})
    assert "version 7, expected 8" in failures[2]
    assert "to rank 2" in failures[0]
    assert "the connection ended" in failures[0]


def test_a_peer_that_is_gone_is_named_at_once() -> None:
    ends = Ends(timeout=60.0)
    ends.listeners[1]._socket.close()
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ends.receive, 2, "round 1", 1)
        with pytest.raises(TransferError, match=r"to rank 1 at .*: the connection ended: .*refused"):
            ends.send("round 1", 1, parameters())
        # Rank 2, which was reached, does not wait out its limit either.
        assert "from rank 0, bucket 0: the connection ended: closed by the peer" in str(other.exception())
    assert time.monotonic() - begun < 30


def test_a_receiver_that_is_gone_ends_the_sender() -> None:
    """A message that is longer than what the kernel takes on its own."""
    listener = Listener(HOST)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept, {0}, rank=1, round="round 1", token=TOKEN, timeout_seconds=60)
        sender = connect({1: Endpoint(HOST, listener.port, TOKEN)}, rank=0, round="round 1", timeout_seconds=60)
        sending = sender.post(3, {1: torch.zeros(10**8, dtype=torch.uint8)}, {})
        accepted.result().close()
    with pytest.raises(TransferError, match="to rank 1, bucket 3: the connection ended"):
        sending.sent()
    sender.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, r"from rank 0, bucket 1: the connection ended: .* \(parameters from model"),
        (signal.SIGSTOP, r"from rank 0, bucket 1: not done within 2 s \(parameters from model"),
    ],
)
def test_a_sender_that_is_killed_or_frozen_in_the_middle(how: signal.Signals, message: str) -> None:
    """A process that sends bucket 0 and says so; then the signal."""
    ends = Ends(timeout=2.0)
    code = (
        "import sys, time\n"
        "from tests.unit.weights.transport.test_sockets import *\n"
        "print('ready', flush=True)\n"
        "endpoints = {1: Endpoint(HOST, int(sys.argv[1]), TOKEN)}\n"
        "transport = connect(endpoints, rank=0, round='round 1', timeout_seconds=60)\n"
        "exchange = Exchange(RankPlan.of(plan(), 0, {}))\n"
        "check = verified('full', 1)\n"
        "first = exchange._post(0, parameters(), OnlyTo1(transport), 1, check)\n"
        "first.sent()\n"
        "print('sent', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ends.endpoints[1].port)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ends.receive, 1, "round 1", 1)
            assert process.stdout.readline() == "sent\n"
            os.kill(process.pid, how)
            with pytest.raises(TransferError, match=message):
                waiting.result(timeout=30)
    finally:
        process.kill()
        process.wait()


class OnlyTo1:
    """The messages to rank 1 of a transport that is connected to that one alone."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.allocate = transport.allocate

    def post(self, bucket: int, outgoing: dict[int, Tensor], incoming: dict[int, int]) -> object:
        return self.transport.post(bucket, {1: outgoing[1]} if 1 in outgoing else {}, incoming)


def test_a_bit_flipped_on_the_wire_is_never_loaded() -> None:
    ends = Ends(timeout=10.0)
    with flipping_proxy(ends.endpoints[1].port, at=32) as port:
        ends.endpoints[1] = Endpoint(HOST, port, TOKEN)
        failures = ends.round(1, parameters())
    assert "damaged on the way" in failures[1]


class flipping_proxy:
    """Passes a connection on, with one bit flipped `at` so many bytes after the handshake."""

    def __init__(self, port: int, *, at: int) -> None:
        self.target, self.at = port, at

    def __enter__(self) -> int:
        self.server = socket.create_server((HOST, 0))
        threading.Thread(target=self._serve, daemon=True).start()
        return int(self.server.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.server.close()

    def _serve(self) -> None:
        near, _ = self.server.accept()
        far = socket.create_connection((HOST, self.target))
        threading.Thread(target=self._pass, args=(far, near, None), daemon=True).start()
        self._pass(near, far, 36 + self.at)  # the hello is 36 bytes

    @staticmethod
    def _pass(source: socket.socket, to: socket.socket, flip: int | None) -> None:
        done = 0
        try:
            while data := bytearray(source.recv(4096)):
                if flip is not None and done <= flip < done + len(data):
                    data[flip - done] ^= 8
                done += len(data)
                to.sendall(data)
        except OSError:
            pass
        for end in (source, to):
            end.close()
