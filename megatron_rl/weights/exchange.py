"""Carries out a shard plan: packs what a rank sends, unpacks what it gets, bucket by bucket.

    sender    parameters -> message of a (bucket, receiver) -> transport
    receiver  transport -> message -> loader, slice by slice; what the rank holds itself is copied without a message

The next bucket travels while the last is loaded: at most two buckets of messages exist. A message ends with the version
and the sum of its words, so one that is damaged or of another synchronisation is never loaded. With `verify`, senders
add each slice's checksum and the loader compares the parameters that it has filled with their sums.

    message = slices, each padded to 8 bytes | checksum of each slice, if verified | version | sum of the words before
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.weights.boxes import Block
from megatron_rl.weights.checksum import byte_sum, checksum
from megatron_rl.weights.shard_plan import ShardPlan, Slice

_ALIGNMENT = 8
_SAMPLED_OF = 16
"""`sync.verify: sample` takes checksums of one parameter in so many, others each time."""


OnFilled = Callable[[str, Tensor], None]
"""Told the name and the values of an engine's parameter when all of it has come."""


class TransferError(RuntimeError):
    """Weights did not arrive: a peer is gone, late, or sent something else. Names peer, bucket and parameter."""


@dataclass(frozen=True)
class EngineShard:
    """What a rank of an engine expects, from its plan.

    Attributes:
        shapes: of every target, by name.
        zeros: rows of padding: (target, dimension, start, size).
        expert_rows: row of each expert in vLLM's stacked weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    zeros: tuple[tuple[str, int, int, int], ...]
    expert_rows: Mapping[int, int]


class Loader(Protocol):
    """Takes slices into an engine's parameters."""

    def write(self, piece: Slice, values: Tensor, expected: int | None) -> None:
        """Copy `values` to their place; `expected` is their checksum on the sending side, if it was taken."""
        ...

    def end_bucket(self) -> None:
        """Parameters that are complete may be put to use."""
        ...


class Pending(Protocol):
    """Messages of a bucket on their way."""

    def arrived(self, sender: int) -> Tensor:
        """The message of a sender, [num_bytes] uint8; waits. Raises TransferError after the transport's time limit."""
        ...

    def loaded(self, sender: int) -> None:
        """The message of a sender is used no more; its memory may be written again."""
        ...

    def sent(self) -> None:
        """Wait until this rank's own messages need their buffers no more. Raises TransferError likewise."""
        ...


class Transport(Protocol):
    """Moves messages between ranks."""

    def allocate(self, bucket: int, receiver: int, num_bytes: int) -> Tensor:
        """Memory for a message to a receiver, [num_bytes] uint8."""
        ...

    def post(self, bucket: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> Pending:
        """Begin to send `outgoing` (receiver -> message) and to receive `incoming` (sender -> bytes)."""
        ...


@dataclass(frozen=True)
class Bucket:
    """What one rank does in a bucket: slices to send by receiver, to get by sender, and to copy from itself."""

    outgoing: dict[int, list[Slice]]
    incoming: dict[int, list[Slice]]
    own: list[Slice]


@dataclass(frozen=True)
class Orders:
    """The part of one rank in a plan."""

    buckets: list[Bucket]
    shard: EngineShard
    """What its engine expects; empty on a rank that only sends."""

    @classmethod
    def of(cls, plan: ShardPlan, rank: int, expert_rows: Mapping[int, int]) -> "Orders":
        """The orders of a rank."""
        buckets = []
        for index in range(plan.num_buckets):
            outgoing, incoming = plan.sends(rank, index), plan.receives(rank, index)
            outgoing.pop(rank, None)
            buckets.append(Bucket(outgoing, incoming, incoming.pop(rank, [])))
        shard = EngineShard(plan.targets_of(rank), tuple(plan.zeros(rank)), expert_rows)
        return cls(buckets, shard)

    @property
    def received_bytes(self) -> int:
        """Bytes of this rank's engine parameters that one synchronisation writes."""
        return sum(
            piece.num_bytes for b in self.buckets for pieces in (*b.incoming.values(), b.own) for piece in pieces
        )

    def to_json(self) -> str:
        """As text, for a rank in another process."""
        return json.dumps([[dataclasses.astuple(bucket) for bucket in self.buckets], dataclasses.astuple(self.shard)])

    @classmethod
    def from_json(cls, text: str) -> "Orders":
        """Inverse of `to_json`."""
        buckets, (shapes, zeros, expert_rows) = json.loads(text)
        shard = EngineShard(
            {name: tuple(shape) for name, shape in shapes.items()},
            tuple(tuple(row) for row in zeros),
            {int(expert): row for expert, row in expert_rows.items()},
        )
        read = [Bucket(_by_peer(outgoing), _by_peer(incoming), _slices(own)) for outgoing, incoming, own in buckets]
        return cls(read, shard)


def _by_peer(side: dict[str, list[Any]]) -> dict[int, list[Slice]]:
    return {int(peer): _slices(rows) for peer, rows in side.items()}


def _slices(rows: list[Any]) -> list[Slice]:
    return [
        Slice(source, target, Block(tuple(a), tuple(b), tuple(size), *steps), dtype)
        for source, target, (a, b, size, *steps), dtype in rows
    ]


class Exchange:
    """The part of one rank in a plan: sender, receiver or both. Used again for every version."""

    def __init__(self, orders: Orders, transport: Transport) -> None:
        self._buckets, self.transport = orders.buckets, transport

    def run(
        self,
        parameters: Mapping[str, Tensor],
        loader: Loader | None,
        *,
        version: int,
        verify: Callable[[str], bool] = lambda target: False,
    ) -> None:
        """Send and load one version. Every rank of the plan calls it.

        Args:
            parameters: trained shards by table name; {} on a rank that only receives.
            loader: of this rank's engine; None on a rank that only sends.
            version: of the weights, equal on all ranks.
            verify: whether a target's checksum is taken; the same on all ranks.

        Raises:
            TransferError: a message did not come, or is not what it should be.
        """
        pending = self._post(0, parameters, version, verify) if self._buckets else None
        for index, bucket in enumerate(self._buckets):
            assert pending is not None
            current, pending = pending, None
            if index + 1 < len(self._buckets):
                pending = self._post(index + 1, parameters, version, verify)
            if loader is not None:
                for piece in bucket.own:
                    values = _values(piece, parameters)
                    loader.write(piece, values, _expected(piece, values, verify))
                for sender, pieces in bucket.incoming.items():
                    message = current.arrived(sender)
                    self._unpack(message, pieces, loader, f"from rank {sender}, bucket {index}", version, verify)
                    current.loaded(sender)
                loader.end_bucket()
            current.sent()

    def _post(
        self, index: int, parameters: Mapping[str, Tensor], version: int, verify: Callable[[str], bool]
    ) -> Pending:
        bucket = self._buckets[index]
        outgoing = {
            receiver: self._pack(index, receiver, pieces, parameters, version, verify)
            for receiver, pieces in bucket.outgoing.items()
        }
        incoming = {sender: _message_bytes(pieces, verify) for sender, pieces in bucket.incoming.items()}
        return self.transport.post(index, outgoing, incoming)

    def _pack(
        self,
        bucket: int,
        receiver: int,
        pieces: list[Slice],
        parameters: Mapping[str, Tensor],
        version: int,
        verify: Callable[[str], bool],
    ) -> Tensor:
        message = self.transport.allocate(bucket, receiver, _message_bytes(pieces, verify))
        checksums: list[int] = []
        offset = 0
        for piece in pieces:
            values = _values(piece, parameters)
            end = offset + piece.num_bytes
            message[offset:end].view(values.dtype).view(piece.block.size).copy_(values)
            if (expected := _expected(piece, values, verify)) is not None:
                checksums.append(expected)
            offset += _padded(piece.num_bytes)
            message[end:offset] = 0
        words = message.view(torch.int64)
        words[offset // 8 : -1] = torch.tensor([*checksums, version], device=message.device)
        words[-1] = byte_sum(message[:-8])
        return message

    @staticmethod
    def _unpack(
        message: Tensor, pieces: list[Slice], loader: Loader, where: str, version: int, verify: Callable[[str], bool]
    ) -> None:
        first = pieces[0].target
        sent_version, total = message[-16:].view(torch.int64).tolist()
        if total != byte_sum(message[:-8]):
            raise TransferError(f"weights {where}, from parameter {first} on: damaged on the way")
        if sent_version != version:
            raise TransferError(f"weights {where}: version {sent_version}, expected {version}")
        offset = 0
        expected = iter(message[_payload_bytes(pieces) : -16].view(torch.int64).tolist())
        for piece in pieces:
            dtype = getattr(torch, piece.dtype)
            values = message[offset : offset + piece.num_bytes].view(dtype).view(piece.block.size)
            loader.write(piece, values, next(expected) if verify(piece.target) else None)
            offset += _padded(piece.num_bytes)


def _values(piece: Slice, parameters: Mapping[str, Tensor]) -> Tensor:
    return parameters[piece.source].detach()[piece.block.source_box].to(getattr(torch, piece.dtype))


def _expected(piece: Slice, values: Tensor, verify: Callable[[str], bool]) -> int | None:
    return checksum(values, piece.block.target_start, piece.block.target_step) if verify(piece.target) else None


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _payload_bytes(pieces: list[Slice]) -> int:
    return sum(_padded(piece.num_bytes) for piece in pieces)


def _message_bytes(pieces: list[Slice], verify: Callable[[str], bool]) -> int:
    return _payload_bytes(pieces) + 8 * sum(verify(piece.target) for piece in pieces) + 16


def verified(verify: str, version: int) -> Callable[[str], bool]:
    """Which of the engine's parameters `sync.verify` takes checksums of; the same on every rank.

    Args:
        verify: 'off', 'sample' or 'full'.
        version: decides which ones are sampled.
    """
    if verify == "sample":
        return lambda target: zlib.crc32(target.encode()) % _SAMPLED_OF == version % _SAMPLED_OF
    return lambda target: verify == "full"
