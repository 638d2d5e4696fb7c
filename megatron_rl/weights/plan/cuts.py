"""How the copies of a parameter are cut among the replicas of its source, so that they send equally much.

`cuts_of` intersects the blocks of sources and target (`blocks.py`), divides them into parts no larger than a bucket,
and splits each part among the replicas (`_split`). The result, `PairCuts`, holds for all pairs of parameters that
differ in the numbers of their layer and expert alone. Pure.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from megatron_rl.weights.plan.blocks import BlockCopy, blocks_of, overlap
from megatron_rl.weights.plan.ranks import Entry

_MIN_CUT_BYTES = 64 * 1024
"""A parameter is not cut into smaller parts than this to balance the senders."""


class Cut(NamedTuple):
    """A block copy with its ranks. `slot`: which of the source shard's replicas sends it, before turns are taken."""

    source_shard: int
    slot: int | None  # None: the receiver holds it itself
    receiver: int
    block: BlockCopy


@dataclass
class PairCuts:
    """The cuts of a pair of source and target, by part; the same for all pairs of its class on the same ranks."""

    parts: list[list[Cut]]
    part_bytes: int
    takes_turns: bool
    by_sender: list[dict[int, list[Cut]]] = field(default_factory=list)
    by_receiver: list[dict[int, list[Cut]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for part in self.parts:
            senders: dict[int, list[Cut]] = {}
            receivers: dict[int, list[Cut]] = {}
            for cut in part:
                senders.setdefault(cut.source_shard, []).append(cut)
                receivers.setdefault(cut.receiver, []).append(cut)
            self.by_sender.append(senders)
            self.by_receiver.append(receivers)


def cuts_of(sources: Sequence[Entry], target: Entry, bucket_bytes: int) -> list[PairCuts]:
    """The cuts from each of the sources that together make up a target."""
    targets = [blocks_of(target.map, shard, len(target.shards)) for shard in range(len(target.shards))]
    written = [0] * len(targets)
    found: list[dict[tuple[int, int], list[BlockCopy]]] = []
    for source in sources:
        blocks: dict[tuple[int, int], list[BlockCopy]] = {}
        for s in range(len(source.shards)):
            of_shard = blocks_of(source.map, s, len(source.shards))
            for t, wanted in enumerate(targets):
                common = [block for a in of_shard for b in wanted if (block := overlap(a, b)) is not None]
                if common:
                    blocks[s, t] = common
                    written[t] += sum(block.numel for block in common)
        found.append(blocks)
    for t, wanted in enumerate(targets):
        needed = sum(prod(block.size) for block in wanted)
        if written[t] != needed:
            names = ", ".join(source.map.name for source in sources)
            raise ValueError(f"{target.map.name}: {names} make {written[t]} of its shard's {needed} elements")
    return [_cuts_of_pair(source, target, blocks, bucket_bytes) for source, blocks in zip(sources, found, strict=True)]


def _cuts_of_pair(
    source: Entry, target: Entry, blocks: dict[tuple[int, int], list[BlockCopy]], bucket_bytes: int
) -> PairCuts:
    of_target: Counter[int] = Counter()
    for (_, t), common in blocks.items():
        of_target[t] += sum(block.numel for block in common) * target.itemsize
    largest = max(of_target.values(), default=0)
    num_parts = max(1, -(-largest // bucket_bytes))
    parts: list[list[Cut]] = []
    odd = False
    for part in range(num_parts):
        cuts: list[Cut] = []
        for s, replicas in enumerate(source.shards):
            lines: list[tuple[int, int, BlockCopy]] = []  # (engine, receiver, block)
            for t, receivers in enumerate(target.shards):
                piece = [b for block in blocks.get((s, t), ()) for b in _part_of(block, part, num_parts)]
                for engine, receiver in enumerate(receivers):
                    if receiver in replicas:
                        cuts += [Cut(s, None, receiver, block) for block in piece]
                    else:
                        lines += [(engine, receiver, block) for block in piece]
            lines.sort(key=lambda line: line[:2])
            split, uneven = _split(s, lines, len(replicas), target.itemsize)
            cuts += split
            odd = odd or uneven
        parts.append(cuts)
    return PairCuts(parts, -(-largest // num_parts), odd)


def _part_of(block: BlockCopy, part: int, num_parts: int) -> list[BlockCopy]:
    rows = block.size[0]
    begin, end = part * rows // num_parts, (part + 1) * rows // num_parts
    return [block.rows(begin, end)] if end > begin else []


def _split(
    shard: int, lines: Sequence[tuple[int, int, BlockCopy]], replicas: int, itemsize: int
) -> tuple[list[Cut], bool]:
    """Split the block copies of a shard evenly among its replicas.

    They are laid end to end in the order of the engines, and cut between rows at multiples of 1/replicas of the total
    length; at fewer places where a split would be shorter than _MIN_CUT_BYTES.

    Returns:
        The cuts, and whether the splits are uneven, so that the pairs of the class must take turns.
    """
    total = sum(block.numel for _, _, block in lines)
    num_splits = max(1, min(replicas, total * itemsize // _MIN_CUT_BYTES))
    cuts: list[Cut] = []
    sizes: Counter[int] = Counter()
    done = slot = 0
    for _, receiver, block in lines:
        row_numel = block.numel // block.size[0]
        begin = 0
        while begin < block.size[0]:
            boundary = (slot + 1) * total / num_splits
            rows = min(block.size[0] - begin, round((boundary - done) / row_numel))
            if rows > 0:
                cuts.append(Cut(shard, slot, receiver, block.rows(begin, begin + rows)))
                sizes[slot] += rows * row_numel
                begin += rows
                done += rows * row_numel
            if begin < block.size[0]:
                if slot == num_splits - 1:  # what rounding has left
                    cuts.append(Cut(shard, slot, receiver, block.rows(begin, block.size[0])))
                    done += (block.size[0] - begin) * row_numel
                    begin = block.size[0]
                else:
                    slot += 1
    uneven = num_splits < replicas or any(abs(size * num_splits - total) > 0.02 * total for size in sizes.values())
    return cuts, bool(lines) and uneven
