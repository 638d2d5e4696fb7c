"""Which ranks own which parameter: `TrainedRanks` and `EngineRanks`, from the parallel sizes of either side.

Both list their parameters as entries of a shard plan: an `Entry` is a parameter and, for each of its shards, the ranks
that own a replica of it. Rank numbers are those of one list for trained ranks and engine ranks: colocated engines are
on the trained ranks, disaggregated ones come after them. Arithmetic alone.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_rl.models.tensor_map import TensorMap

Ranks = tuple[int, ...]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""Bytes of an element, by the name of its torch dtype."""


@dataclass(frozen=True)
class Entry:
    """A parameter of one side, and the ranks that own its shards.

    Attributes:
        map: what its shards are made of; `map.name` names it on its side.
        shards: owners of each shard. Any owner of a source's shard may send it; every owner of a target's must get it.
            A replicated map has a single shard. Entries on the same ranks share the same tuple object.
        dtype: of the elements as they travel, a key of ITEMSIZE; for targets, what the engine holds.
    """

    map: TensorMap
    shards: tuple[Ranks, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]


_EMBEDDING = "model.embed"
"""vLLM's embedding: embed_tokens, in GPT-OSS embedding."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class TrainedRanks:
    """Sizes of the trained model's layout, in Megatron's order of ranks: tp-cp-dp-pp, and etp-ep-edp-pp for experts."""

    tensor: int
    pipeline: int
    data: int
    stage_of_layer: tuple[int, ...]
    """Pipeline stage of each layer."""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.stage_size * self.pipeline

    def entries(self, maps: Sequence[TensorMap], dtype: Callable[[TensorMap], str]) -> list[Entry]:
        """The family's table over these ranks."""
        return [Entry(tensor_map, self._shards(tensor_map), dtype(tensor_map)) for tensor_map in maps]

    def _shards(self, tensor_map: TensorMap) -> tuple[Ranks, ...]:
        stage = _stage(tensor_map.name, self.stage_of_layer, self.pipeline, "embedding.")
        owner = tensor_map.expert_parallel_rank(self.expert)
        if owner is None:
            return (self._replicated if tensor_map.replicated else self._dense)[stage]
        shards = self._experts[stage][owner]
        return self._merged[id(shards)] if tensor_map.replicated else shards

    @cached_property
    def _dense(self) -> list[tuple[Ranks, ...]]:
        return [
            tuple(tuple(range(first + t, first + self.stage_size, self.tensor)) for t in range(self.tensor))
            for first in self._first_ranks
        ]

    @cached_property
    def _replicated(self) -> list[tuple[Ranks, ...]]:
        return [(tuple(range(first, first + self.stage_size)),) for first in self._first_ranks]

    @cached_property
    def _experts(self) -> list[list[tuple[Ranks, ...]]]:
        step = self.expert_tensor * self.expert
        return [
            [
                tuple(
                    tuple(range(first + e * self.expert_tensor + t, first + self.stage_size, step))
                    for t in range(self.expert_tensor)
                )
                for e in range(self.expert)
            ]
            for first in self._first_ranks
        ]

    @cached_property
    def _merged(self) -> dict[int, tuple[Ranks, ...]]:
        """Of the ranks of each stage's experts, one shard that all of them own."""
        return {
            id(shards): (tuple(sorted(rank for ranks in shards for rank in ranks)),)
            for of_stage in self._experts
            for shards in of_stage
        }

    @property
    def _first_ranks(self) -> range:
        return range(0, self.world_size, self.stage_size)


@dataclass(frozen=True)
class EngineRanks:
    """Engines of equal size on consecutive ranks: engine, then pipeline stage, then tensor rank."""

    num_engines: int
    tensor: int
    stage_of_layer: tuple[int, ...]
    pipeline: int = 1
    first_rank: int = 0
    expert_parallel: bool = False
    """Experts are spread over all ranks of all engines, vLLM's data-parallel ranks; else each is split by tensor."""
    num_experts: int = 0
    tied: bool = False
    """The embedding is also the output layer, so that the last stage holds it too."""

    @property
    def world_size(self) -> int:
        """Ranks of all engines."""
        return self.num_engines * self.pipeline * self.tensor

    def engine_ranks(self, engine: int) -> range:
        """Ranks of an engine."""
        size = self.pipeline * self.tensor
        return range(self.first_rank + engine * size, self.first_rank + (engine + 1) * size)

    def entries(self, maps: Sequence[TensorMap], dtype: Callable[[TensorMap], str]) -> list[Entry]:
        """vLLM's table over these ranks."""
        return [Entry(tensor_map, self._shards(tensor_map), dtype(tensor_map)) for tensor_map in maps]

    def expert_rows(self, rank: int) -> dict[int, int]:
        """Global number of each expert of a rank -> its row in vLLM's stacked weights."""
        if not self.expert_parallel:
            return {expert: expert for expert in range(self.num_experts)}
        mine = [expert for expert in range(self.num_experts) if self._owner(expert) == rank - self.first_rank]
        return {expert: row for row, expert in enumerate(mine)}

    def _owner(self, expert: int) -> int:
        """vLLM's linear placement: consecutive experts; if they do not come out even, the first ranks take one more."""
        least, more = divmod(self.num_experts, self.world_size)
        boundary = more * (least + 1)
        return expert // (least + 1) if expert < boundary else more + (expert - boundary) // least

    def _shards(self, tensor_map: TensorMap) -> tuple[Ranks, ...]:
        stage = _stage(tensor_map.name, self.stage_of_layer, self.pipeline, _EMBEDDING)
        if tensor_map.expert is not None and self.expert_parallel:
            assert self.pipeline == 1, "vLLM spreads experts over the ranks of one stage"
            return self._single[self._owner(tensor_map.expert)]
        on_both_ends = self.tied and tensor_map.name.startswith(_EMBEDDING) and self.pipeline > 1
        shards = self._both_ends if on_both_ends else self._stages[stage]
        return self._merged[id(shards)] if tensor_map.replicated else shards

    @cached_property
    def _stages(self) -> list[tuple[Ranks, ...]]:
        return [
            tuple(tuple(self._rank(e, p, t) for e in range(self.num_engines)) for t in range(self.tensor))
            for p in range(self.pipeline)
        ]

    @cached_property
    def _both_ends(self) -> tuple[Ranks, ...]:
        return tuple((*a, *b) for a, b in zip(self._stages[0], self._stages[-1], strict=True))

    @cached_property
    def _merged(self) -> dict[int, tuple[Ranks, ...]]:
        """Of each stage, one shard that every rank gets, engine by engine."""
        return {id(shards): (tuple(sorted(r for ranks in shards for r in ranks)),) for shards in self._stages}

    @cached_property
    def _single(self) -> list[tuple[Ranks, ...]]:
        return [((self.first_rank + rank,),) for rank in range(self.world_size)]

    def _rank(self, engine: int, stage: int, tensor: int) -> int:
        return self.first_rank + (engine * self.pipeline + stage) * self.tensor + tensor


def even_stages(num_layers: int, stages: int) -> tuple[int, ...]:
    """Stage of each layer where stages hold equally many, the first ones one more if that does not come out even."""
    least, more = divmod(num_layers, stages)
    return tuple(stage for stage in range(stages) for _ in range(least + (stage < more)))


def layer_of(name: str) -> int | None:
    """Number of the layer that a parameter belongs to; None: of no layer."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def _stage(name: str, stage_of_layer: Sequence[int], stages: int, embedding: str) -> int:
    layer = layer_of(name)
    if layer is not None:
        return stage_of_layer[layer]
    return 0 if name.startswith(embedding) else stages - 1
