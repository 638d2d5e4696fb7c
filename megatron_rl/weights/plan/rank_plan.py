"""A rank plan: one rank's part in a shard plan, as it is sent to a rank in another process."""

import base64
import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.weights.plan.blocks import BlockCopy
from megatron_rl.weights.plan.shard_plan import ShardPlan, Slice


@dataclass(frozen=True)
class EngineShard:
    """What a rank of an engine receives by its plan.

    Attributes:
        shapes: of every target, by name.
        zeros: rows of padding: (target, dimension, start, size).
        expert_rows: row of each expert in vLLM's stacked weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    zeros: tuple[tuple[str, int, int, int], ...]
    expert_rows: Mapping[int, int]


@dataclass(frozen=True)
class Bucket:
    """One rank's part in a bucket: slices to send by receiver, to receive by sender, and to copy from itself."""

    outgoing: dict[int, list[Slice]]
    incoming: dict[int, list[Slice]]
    own: list[Slice]


@dataclass(frozen=True)
class RankPlan:
    """The part of one rank in a plan."""

    buckets: list[Bucket]
    shard: EngineShard
    """What its engine receives; empty on a rank that only sends."""

    @classmethod
    def of(cls, plan: ShardPlan, rank: int, expert_rows: Mapping[int, int]) -> "RankPlan":
        """The rank plan of a rank."""
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
        return sum(piece.num_bytes for pieces in self._received() for piece in pieces)

    def _received(self) -> Iterator[list[Slice]]:
        for bucket in self.buckets:
            yield from bucket.incoming.values()
            yield bucket.own

    @property
    def receivers(self) -> set[int]:
        """Other ranks that this one sends to."""
        return {receiver for bucket in self.buckets for receiver in bucket.outgoing}

    @property
    def senders(self) -> set[int]:
        """Other ranks that send to this one."""
        return {sender for bucket in self.buckets for sender in bucket.incoming}

    def to_text(self) -> str:
        """For a rank in another process; compressed, as a plan says much the same of each layer."""
        fields = [[dataclasses.astuple(bucket) for bucket in self.buckets], dataclasses.astuple(self.shard)]
        return base64.b64encode(zlib.compress(json.dumps(fields).encode(), level=1)).decode()

    @classmethod
    def from_text(cls, text: str) -> "RankPlan":
        """Inverse of `to_text`."""
        buckets, (shapes, zeros, expert_rows) = json.loads(zlib.decompress(base64.b64decode(text)))
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
        Slice(source, target, BlockCopy(tuple(a), tuple(b), tuple(size), *steps), dtype)
        for source, target, (a, b, size, *steps), dtype in rows
    ]
