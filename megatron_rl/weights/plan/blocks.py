"""Rectangular blocks of matrices: what a shard consists of (`blocks_of`), and what two shards share (`overlap`).

A `Block` lies in a Hugging Face matrix and in one shard. A `BlockCopy` copies a block from a source shard to a target
shard. Pure: numbers in, numbers out.
"""

from math import prod
from typing import NamedTuple

from megatron_rl.models.tensor_map import TensorMap


class BlockCopy(NamedTuple):
    """A block that is copied from one shard to another: where it begins in each, and its size, by dimension.

    Rows (the first dimension) are `source_step` apart in the source and `target_step` apart in the target.
    """

    source_start: tuple[int, ...]
    target_start: tuple[int, ...]
    size: tuple[int, ...]
    source_step: int = 1
    target_step: int = 1

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.size)

    @property
    def source_index(self) -> tuple[slice, ...]:
        """Index of the block in the source."""
        return _index(self.source_start, self.size, self.source_step)

    @property
    def target_index(self) -> tuple[slice, ...]:
        """Index of the block in the target."""
        return _index(self.target_start, self.size, self.target_step)

    def rows(self, begin: int, end: int) -> "BlockCopy":
        """The copy of rows [begin, end) of the block."""
        first = (self.source_start[0] + begin * self.source_step, *self.source_start[1:])
        second = (self.target_start[0] + begin * self.target_step, *self.target_start[1:])
        return self._replace(source_start=first, target_start=second, size=(end - begin, *self.size[1:]))


def _index(start: tuple[int, ...], size: tuple[int, ...], step: int) -> tuple[slice, ...]:
    rows = slice(start[0], start[0] + (size[0] - 1) * step + 1, step)
    return (rows, *(slice(a, a + n) for a, n in zip(start[1:], size[1:], strict=True)))


class Block(NamedTuple):
    """A rectangular block of a Hugging Face matrix, its rows `step` apart; `local` is where it begins in a shard."""

    hf_name: str
    start: tuple[int, ...]
    local: tuple[int, ...]
    size: tuple[int, ...]
    step: int


def blocks_of(tensor_map: TensorMap, shard: int, num_shards: int) -> list[Block]:
    """The blocks that a shard of a parameter is made of, without padding."""
    blocks, offset, dim = [], 0, tensor_map.dim
    for row_range in tensor_map.row_ranges(shard, num_shards):
        if row_range.hf_name is not None:
            shape = tensor_map.matrix_shape(row_range.hf_name)
            start, local, size = [0] * len(shape), [0] * len(shape), list(shape)
            start[dim], local[dim], size[dim] = row_range.start, offset, row_range.size
            assert dim == 0 or row_range.step == 1, "only rows are taken in steps"
            blocks.append(Block(row_range.hf_name, tuple(start), tuple(local), tuple(size), row_range.step))
        offset += row_range.size
    return blocks


def overlap(source: Block, target: Block) -> BlockCopy | None:
    """The intersection of two blocks, as a copy from the first one's shard to the second one's; None if it is empty."""
    if source.hf_name != target.hf_name:
        return None
    rows = _common_rows(source, target)
    first = [max(a, b) for a, b in zip(source.start[1:], target.start[1:], strict=True)]
    ends = [
        min(a + m, b + n)
        for a, m, b, n in zip(source.start[1:], source.size[1:], target.start[1:], target.size[1:], strict=True)
    ]
    if not rows or any(end <= begin for begin, end in zip(first, ends, strict=True)):
        return None
    locals_of = [
        (
            block.local[0] + (rows[0] - block.start[0]) // block.step,
            *(x + f - a for x, f, a in zip(block.local[1:], first, block.start[1:], strict=True)),
        )
        for block in (source, target)
    ]
    size = (len(rows), *(end - begin for begin, end in zip(first, ends, strict=True)))
    return BlockCopy(locals_of[0], locals_of[1], size, rows.step // source.step, rows.step // target.step)


def _common_rows(source: Block, target: Block) -> range:
    """Rows that are in both blocks: two ranges of which one's step is a multiple of the other's."""
    a, b = (range(x.start[0], x.start[0] + x.size[0] * x.step, x.step) for x in (source, target))
    coarse, fine = (a, b) if a.step >= b.step else (b, a)
    assert coarse.step % fine.step == 0
    if (coarse.start - fine.start) % fine.step:
        return range(0)
    begin = max(coarse.start, coarse.start + -(-(fine.start - coarse.start) // coarse.step) * coarse.step)
    return range(begin, min(coarse.stop, fine.stop), coarse.step)
