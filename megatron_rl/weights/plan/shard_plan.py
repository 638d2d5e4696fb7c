"""The shard plan: which rank sends which slice of which parameter to which rank in a weight sync.

Both sides are described by the same kind of table (`models/tensor_map.py`): a shard is made of row ranges of Hugging
Face matrices. So the plan is an intersection: elements in a row range of a trained shard and in one of an engine's
shard are copied from the former to the latter. Interleaved query groups, stacked projections, replicated
KV heads, numbered experts and padded vocabularies are all in the tables; this file does not know them.

    sources x targets -> pairs that share tensors -> blocks per pair of shards -> a sender each -> buckets

Every element of every target is written once. It comes from the rank itself if that owns it, else from one of the
replicas, which share the work of each parameter evenly and, where they can, serve different engines. Parameters
travel in the order of the targets in buckets of bounded size, so an engine can load one while the next travels.

Layers and experts repeat, so the blocks are computed once for each class of pairs and each rank enumerates only what
it sends or receives: a plan of thousands of ranks takes seconds. Pure: no tensor, no process group, no device.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.weights.plan.blocks import BlockCopy
from megatron_rl.weights.plan.cuts import Cut, PairCuts, cuts_of
from megatron_rl.weights.plan.engine_table import engine_maps
from megatron_rl.weights.plan.ranks import ITEMSIZE, EngineRanks, Entry, Ranks, TrainedRanks

_NUMBERS = re.compile(r"\d+")


class Slice(NamedTuple):
    """A block copy between two named parameters: what travels in messages."""

    source: str
    target: str
    block: BlockCopy
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return self.block.numel * ITEMSIZE[self.dtype]


class _Pair(NamedTuple):
    """A source and a target that share tensors. `turn`: number among the pairs of its class."""

    source: Entry
    target: Entry
    cuts: PairCuts
    turn: int

    def sender(self, cut: Cut) -> int:
        if cut.slot is None:
            return cut.receiver
        replicas = self.source.shards[cut.source_shard]
        return replicas[(cut.slot + self.turn) % len(replicas)]


class ShardPlan:
    """The copies of one synchronisation."""

    def __init__(self, sources: Sequence[Entry], targets: Sequence[Entry], *, bucket_bytes: int) -> None:
        """Plan the copies.

        Args:
            sources: parameters of the trained model.
            targets: parameters of the engines, in the order in which they are to be loaded.
            bucket_bytes: what a rank receives in one bucket, at most.

        Raises:
            ValueError: the sources do not make up every element of a target exactly once; it is named.
        """
        self.sources, self.targets = sources, targets
        self._pairs = _pairs(sources, targets, bucket_bytes)
        self.buckets = _buckets(self._pairs, bucket_bytes)
        self._placed = [
            {key: _places(shards) for key, shards in {id(entry.shards): entry.shards for entry in entries}.items()}
            for entries in (sources, targets)
        ]

    @property
    def num_buckets(self) -> int:
        """Number of buckets."""
        return len(self.buckets)

    def sends(self, rank: int, bucket: int) -> dict[int, list[Slice]]:
        """What a rank sends in a bucket, by receiver, in the order of the message; its own needs are in it too."""
        out: dict[int, list[Slice]] = {}
        for pair, part in self._items(bucket):
            for shard in self._placed[0][id(pair.source.shards)].get(rank, ()):
                for cut in pair.cuts.by_sender[part].get(shard, ()):
                    if pair.sender(cut) == rank:
                        out.setdefault(cut.receiver, []).append(_slice(pair, cut))
        return out

    def receives(self, rank: int, bucket: int) -> dict[int, list[Slice]]:
        """What a rank gets in a bucket, by sender, in the order of the message."""
        out: dict[int, list[Slice]] = {}
        for pair, part in self._items(bucket):
            for cut in pair.cuts.by_receiver[part].get(rank, ()):
                out.setdefault(pair.sender(cut), []).append(_slice(pair, cut))
        return out

    def zeros(self, rank: int) -> Iterator[tuple[str, int, int, int]]:
        """Rows of padding of a rank's targets: (target, dimension, start, size). Nobody sends them."""
        for entry in self.targets:
            for shard in self._placed[1][id(entry.shards)].get(rank, ()):
                offset = 0
                for rows in entry.map.row_ranges(shard, len(entry.shards)):
                    if rows.hf_name is None:
                        yield entry.map.name, entry.map.dim, offset, rows.size
                    offset += rows.size

    def targets_of(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of each target that a rank holds, padding included."""
        return {
            entry.map.name: entry.map.shard_shape(shard, len(entry.shards))
            for entry in self.targets
            for shard in self._placed[1][id(entry.shards)].get(rank, ())
        }

    def traffic(self) -> Counter[tuple[int, int]]:
        """Bytes by (sender, receiver); what a rank copies to itself is under (rank, rank)."""
        alike: Counter[tuple[int, int, int, int]] = Counter()
        example: dict[tuple[int, int, int, int], _Pair] = {}
        for pair in self._pairs:
            turns = max(len(replicas) for replicas in pair.source.shards)
            key = (id(pair.cuts), id(pair.source.shards), id(pair.target.shards), pair.turn % turns)
            alike[key] += 1
            example.setdefault(key, pair)
        total: Counter[tuple[int, int]] = Counter()
        for key, count in alike.items():
            pair = example[key]
            for part in pair.cuts.parts:
                for cut in part:
                    num_bytes = count * cut.block.numel * pair.target.itemsize
                    total[pair.sender(cut), cut.receiver] += num_bytes
        return total

    def _items(self, bucket: int) -> Iterator[tuple[_Pair, int]]:
        for index, part in self.buckets[bucket]:
            yield self._pairs[index], part


def plan_sync(
    hf: dict[str, Any],
    maps: Sequence[TensorMap],
    trained: TrainedRanks,
    engines: EngineRanks,
    *,
    dtype: str,
    bucket_bytes: int,
) -> ShardPlan:
    """The plan from a trained model to vLLM engines whose weights have the same dtype.

    Args:
        hf: config.json of the model.
        maps: the table of its family.
        trained, engines: which ranks hold which parameter.
        dtype: of the weights, a key of `ITEMSIZE`; those that the table keeps in float32 travel so.
        bucket_bytes: what a rank receives in one bucket, at most.
    """
    heads = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    in_float32 = {hf_name for tensor_map in maps if tensor_map.float32 for hf_name in tensor_map.hf_shapes}
    sources = trained.entries(maps, lambda tensor_map: "float32" if tensor_map.float32 else dtype)
    targets = engines.entries(
        engine_maps(maps, num_key_value_heads=heads),
        lambda tensor_map: dtype if in_float32.isdisjoint(tensor_map.hf_shapes) else "float32",
    )
    return ShardPlan(sources, targets, bucket_bytes=bucket_bytes)


def _slice(pair: _Pair, cut: Cut) -> Slice:
    return Slice(pair.source.map.name, pair.target.map.name, cut.block, pair.target.dtype)


def _places(shards: tuple[Ranks, ...]) -> dict[int, list[int]]:
    """Shards of each rank."""
    places: dict[int, list[int]] = {}
    for shard, ranks in enumerate(shards):
        for rank in ranks:
            places.setdefault(rank, []).append(shard)
    return places


_Matrix = tuple[str, int | None, bool]
"""A matrix of a checkpoint: tensor, index in it, whether it is transposed."""


def _matrices(tensor_map: TensorMap) -> list[_Matrix]:
    return [(hf_name, tensor_map.index, tensor_map.transposed) for hf_name in tensor_map.hf_shapes]


def _pairs(sources: Sequence[Entry], targets: Sequence[Entry], bucket_bytes: int) -> list[_Pair]:
    of_matrix: dict[_Matrix, list[Entry]] = {}
    for entry in sources:
        for matrix in _matrices(entry.map):
            of_matrix.setdefault(matrix, []).append(entry)
    cuts_of_class: dict[object, list[PairCuts]] = {}
    turns: Counter[tuple[int, int]] = Counter()
    receivers = {rank for entry in targets for ranks in entry.shards for rank in ranks}
    apart = {
        id(shards): receivers.isdisjoint(rank for ranks in shards for rank in ranks)
        for shards in {id(entry.shards): entry.shards for entry in sources}.values()
    }
    pairs: list[_Pair] = []
    for target in targets:
        partners: dict[str, Entry] = {}
        for matrix in _matrices(target.map):
            if matrix not in of_matrix:
                raise ValueError(f"{target.map.name} needs {matrix[0]}, which no trained parameter holds")
            partners |= {entry.map.name: entry for entry in of_matrix[matrix]}
        key = (
            _class(target, apart=False),
            *(_class(partner, apart=apart[id(partner.shards)]) for partner in partners.values()),
        )
        if key not in cuts_of_class:
            cuts_of_class[key] = cuts_of(list(partners.values()), target, bucket_bytes)
        for cuts, source in zip(cuts_of_class[key], partners.values(), strict=True):
            place = (id(cuts), id(source.shards))
            pairs.append(_Pair(source, target, cuts, turns[place] if cuts.takes_turns else 0))
            turns[place] += 1
    return pairs


def _class(entry: Entry, *, apart: bool) -> object:
    """Equal for parameters that differ in the numbers of their layer and expert alone, on the same ranks.

    Sources that are `apart` from all receivers need not be on the same ranks, only on equally many.
    """
    shapes = tuple((_NUMBERS.sub("#", name), shape) for name, shape in entry.map.hf_shapes.items())
    ranks = tuple(len(ranks) for ranks in entry.shards) if apart else id(entry.shards)
    return (_NUMBERS.sub("#", entry.map.name), entry.map.dim, entry.map.index is None, shapes, ranks, entry.dtype)


def _buckets(pairs: Sequence[_Pair], bucket_bytes: int) -> list[list[tuple[int, int]]]:
    """(pair, part) of each bucket."""
    buckets: list[list[tuple[int, int]]] = []
    room = 0
    for index, pair in enumerate(pairs):
        for part in range(len(pair.cuts.parts)):
            size = pair.cuts.part_bytes
            if size > room or not buckets:
                buckets.append([])
                room = bucket_bytes
            buckets[-1].append((index, part))
            room -= size
    return buckets
