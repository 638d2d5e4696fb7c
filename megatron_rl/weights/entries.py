"""What one side of a shard plan holds: parameters, and the ranks that have their shards. Pure."""

from dataclasses import dataclass

from megatron_rl.models.tensor_map import TensorMap

Ranks = tuple[int, ...]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""Bytes of an element, by the name of its torch dtype."""


@dataclass(frozen=True)
class Entry:
    """A parameter of one side, and the ranks that have it.

    Attributes:
        map: what its shards are made of; `map.name` names it on its side.
        shards: ranks of each shard. Any rank of a source's shard may send it; every rank of a target's must get it.
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
