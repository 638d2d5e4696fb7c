"""Messages of an exchange over TCP, between trained ranks and engines on any machines that reach each other.

A rank of an engine listens; trained ranks connect to it for one round, and only to those that they have slices for:

    receiver   nonce
    sender     its rank | HMAC-SHA256(token, nonce, round, sender, receiver)
    receiver   1, or it closes the connection
    sender     bucket | number of bytes | message, bucket after bucket

A peer without the token, or a sender of an earlier round, is refused. The sockets of a peer that has died or given up
are closed, so that the others stop waiting at once; they wait for a frozen or unreachable peer until the time limit.
Messages are in host memory; tensors on GPUs are copied there and back.
"""

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_rl.weights.transport.exchange import Pending
from megatron_rl.weights.transport.messages import TransferError

_HEADER = struct.Struct("<IQ")
_HELLO = struct.Struct("<I32s")
_NONCE_BYTES = 32
_WELCOME = b"\1"
_HANDSHAKE_SECONDS = 5.0
"""A connection that has not authenticated after this time is closed."""


class Endpoint(NamedTuple):
    """Where a rank of an engine listens, and the token that senders must prove to know."""

    host: str
    port: int
    token: str


class Listener:
    """The listening socket of a rank."""

    def __init__(self, host: str) -> None:
        """Listen on an address of this machine, at a free port."""
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, 0), family=family, backlog=1024)
        self.port = int(self._socket.getsockname()[1])

    def accept(
        self, senders: Collection[int], *, rank: int, round: str, token: str, timeout_seconds: float
    ) -> "SocketTransport":
        """Accept the senders of a round.

        Raises:
            TransferError: one of them has not come within the time limit; it is named.
        """
        deadline = time.monotonic() + timeout_seconds
        peers: dict[int, socket.socket] = {}
        while missing := set(senders) - set(peers):
            self._socket.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                _close(peers)
                some = ", ".join(map(str, sorted(missing)[:8]))
                raise TransferError(
                    f"weights for rank {rank}: no connection from rank {some} within {timeout_seconds:g} s"
                ) from None
            with contextlib.suppress(OSError, struct.error):
                connection.settimeout(_HANDSHAKE_SECONDS)
                nonce = secrets.token_bytes(_NONCE_BYTES)
                connection.sendall(nonce)
                sender, proof = _HELLO.unpack(_exactly(connection, _HELLO.size))
                if sender in missing and hmac.compare_digest(proof, _proof(token, nonce, round, sender, rank)):
                    connection.sendall(_WELCOME)
                    peers[sender] = connection
                    continue
            connection.close()
        return SocketTransport(peers, rank=rank, timeout_seconds=timeout_seconds)


def connect(endpoints: Mapping[int, Endpoint], *, rank: int, round: str, timeout_seconds: float) -> "SocketTransport":
    """Connect a sender to its receivers, for one round.

    Args:
        endpoints: by receiving rank.
        rank: of this process in the plan.
        round: the round's name, which the receivers know too; used once.
        timeout_seconds: limit of each wait.

    Raises:
        TransferError: a receiver is gone, does not answer, or refuses; it is named, and all connections are closed.
    """
    peers: dict[int, socket.socket] = {}
    failures: list[TransferError] = []
    # All at once, and to the end even if one fails: those that were reached then see their connections closed.
    with ThreadPoolExecutor(max_workers=max(1, len(endpoints))) as threads:
        futures = {
            receiver: threads.submit(_connect_to, endpoint, receiver, rank, round, timeout_seconds)
            for receiver, endpoint in endpoints.items()
        }
    for receiver, future in futures.items():
        try:
            peers[receiver] = future.result()
        except TransferError as error:
            failures.append(error)
    if failures:
        _close(peers)
        raise failures[0]
    return SocketTransport(peers, rank=rank, timeout_seconds=timeout_seconds)


def _connect_to(endpoint: Endpoint, receiver: int, rank: int, round: str, timeout_seconds: float) -> socket.socket:
    where = f"weights to rank {receiver} at {endpoint.host}:{endpoint.port}"
    connection: socket.socket | None = None
    reached = False
    try:
        connection = socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_seconds)
        nonce = _exactly(connection, _NONCE_BYTES)
        connection.sendall(_HELLO.pack(rank, _proof(endpoint.token, nonce, round, rank, receiver)))
        reached = True
        _exactly(connection, len(_WELCOME))
    except OSError as error:
        if connection is not None:
            connection.close()
        refused = reached and not isinstance(error, TimeoutError)
        reason = "refused: the token or the round is another" if refused else _reason(error, timeout_seconds)
        raise TransferError(f"{where}: {reason}") from None
    return connection


class SocketTransport:
    """The connections of a rank in one round."""

    def __init__(self, peers: Mapping[int, socket.socket], *, rank: int, timeout_seconds: float) -> None:
        self._peers, self._rank, self.timeout_seconds = peers, rank, timeout_seconds
        # Messages of a peer are sent, or received, one after another, and those of different peers side by side.
        self._threads = {peer: ThreadPoolExecutor(max_workers=1) for peer in peers}
        for connection in peers.values():
            connection.settimeout(timeout_seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def allocate(self, bucket: int, receiver: int, num_bytes: int) -> Tensor:
        """Memory of this process."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def post(self, bucket: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> Pending:
        """Begin to send and to receive."""
        return _Posted(
            {
                receiver: self._threads[receiver].submit(self._send, bucket, receiver, message)
                for receiver, message in outgoing.items()
            },
            {
                sender: self._threads[sender].submit(self._receive, bucket, sender, limit)
                for sender, limit in incoming.items()
            },
        )

    def close(self) -> None:
        """End the round: peers that still wait for this rank learn of it at once."""
        _close(self._peers)
        for threads in self._threads.values():
            threads.shutdown(wait=True, cancel_futures=True)

    def fail(self, reason: str) -> None:
        """As `close`."""
        self.close()

    def _send(self, bucket: int, receiver: int, message: Tensor) -> None:
        connection = self._peers[receiver]
        try:
            connection.sendall(_HEADER.pack(bucket, len(message)))
            connection.sendall(_buffer(message))
        except OSError as error:
            reason = _reason(error, self.timeout_seconds)
            raise TransferError(f"weights to rank {receiver}, bucket {bucket}: {reason}") from None

    def _receive(self, bucket: int, sender: int, limit: int) -> Tensor:
        connection, where = self._peers[sender], f"weights from rank {sender}, bucket {bucket}"
        try:
            sent, num_bytes = _HEADER.unpack(_exactly(connection, _HEADER.size))
            if sent != bucket or num_bytes > limit:
                raise TransferError(f"{where}: {num_bytes} bytes of bucket {sent}, expected at most {limit}")
            message = torch.empty(num_bytes, dtype=torch.uint8)
            _fill(connection, _buffer(message))
        except OSError as error:
            raise TransferError(f"{where}: {_reason(error, self.timeout_seconds)}") from None
        return message


class _Posted:
    def __init__(self, sending: dict[int, Future[None]], receiving: dict[int, Future[Tensor]]) -> None:
        self._sending, self._receiving = sending, receiving

    def arrived(self, sender: int) -> Tensor:
        return self._receiving.pop(sender).result()

    def loaded(self, sender: int) -> None:
        """Each message has memory of its own."""

    def sent(self) -> None:
        for sending in self._sending.values():
            sending.result()


def _proof(token: str, nonce: bytes, round: str, sender: int, receiver: int) -> bytes:
    return hmac.digest(token.encode(), nonce + f"{sender} {receiver} {round}".encode(), hashlib.sha256)


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    _fill(connection, memoryview(buffer))
    return bytes(buffer)


def _buffer(message: Tensor) -> memoryview:
    array: Any = message.numpy()
    return memoryview(array)


def _fill(connection: socket.socket, buffer: memoryview) -> None:
    """Raises OSError: nothing came within the socket's limit, or the connection was closed."""
    while len(buffer):
        got = connection.recv_into(buffer)
        if not got:
            raise ConnectionResetError("closed by the peer")
        buffer = buffer[got:]


def _close(peers: Mapping[int, socket.socket]) -> None:
    for connection in peers.values():
        with contextlib.suppress(OSError):  # closed by the peer
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


def _reason(error: OSError, timeout_seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"not done within {timeout_seconds:g} s"
    return f"the connection ended: {error}"
