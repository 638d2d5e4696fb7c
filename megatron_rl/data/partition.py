"""Parts of equal cost: which of a batch's sequences each rank, and each of its rows, gets.

The differencing method (Karmarkar and Karp 1982, "The differencing method of set partitioning") comes close where a
part has many sequences. With a handful each it is off by several per cent of a part, and every rank waits for the
costliest: so the costliest part then moves a sequence to another part, or exchanges one with it, as long as that makes
the costlier of the two cheaper.
"""

import heapq
from bisect import insort
from collections.abc import Sequence
from itertools import count

import numpy as np

_GOOD_ENOUGH = 1e-3
"""Excess of the costliest part over the mean that is not worth an exchange."""
_MOST_EXCHANGES = 4
"""Per part."""


def balanced_parts(items: Sequence[int], costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Parts of almost equal total cost; min(num_parts, len(items)) of them are not empty. Deterministic.

    Args:
        items: indices into costs.
        costs: of all there are, > 0, in any unit.
        num_parts: at least 1.
    """
    if len(items) <= num_parts:
        return [[i] for i in items] + [[] for _ in range(num_parts - len(items))]
    return _exchange(_largest_differencing(items, costs, num_parts), costs)


def _largest_differencing(items: Sequence[int], costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """A solution is a list of at most num_parts (total, items), ascending, the missing ones being empty. The two
    solutions of the largest spread are merged, the largest part of one with the smallest of the other, until one is
    left.
    """
    tie = count()
    heap = [(-costs[i], next(tie), [(costs[i], [i])]) for i in items]  # alone, or beside empty parts: spread is cost
    heapq.heapify(heap)
    while len(heap) > 1:
        _, _, one = heapq.heappop(heap)
        _, _, other = heap[0]
        # Both are ascending. Only as many parts meet as do not fit beside each other; the rest meet empty parts.
        meeting = max(0, len(one) + len(other) - num_parts)
        met = [(a + b, x + y) for (a, x), (b, y) in zip(one[:meeting], other[:meeting][::-1], strict=True)]
        merged = one[meeting:] if len(one) >= len(other) else other[meeting:]
        rest = met + (other[meeting:] if len(one) >= len(other) else one[meeting:])
        if len(rest) == 1:
            insort(merged, rest[0])  # by far the most frequent case, and not one for sorting all parts anew
        else:
            merged = sorted(merged + rest)
        smallest = merged[0][0] if len(merged) == num_parts else 0.0
        heapq.heapreplace(heap, (smallest - merged[-1][0], next(tie), merged))
    return [part for _, part in heap[0][2]]


def _exchange(parts: list[list[int]], costs: Sequence[float]) -> list[list[int]]:
    """The parts after exchanges of the costliest with another: of one item for one, or for none."""
    items = [i for part in parts for i in part]
    # After the items one "none" per part, of cost 0.
    cost = np.array([costs[i] for i in items] + [0.0] * len(parts))
    owner = np.array([p for p, part in enumerate(parts) for _ in part] + list(range(len(parts))))
    total = np.bincount(owner, weights=cost, minlength=len(parts))
    for _ in range(_MOST_EXCHANGES * len(parts)):
        costliest = int(total.argmax())
        if total[costliest] <= (1 + _GOOD_ENOUGH) * total.mean():
            break
        own, others = np.flatnonzero((owner == costliest) & (cost > 0)), np.flatnonzero(owner != costliest)
        moved = cost[own, None] - cost[others]
        higher = np.maximum(total[costliest] - moved, total[owner[others]] + moved)
        give, take = np.unravel_index(higher.argmin(), higher.shape)
        if not higher[give, take] < total[costliest]:
            break
        other, amount = owner[others[take]], moved[give, take]
        total[costliest] -= amount
        total[other] += amount
        owner[own[give]] = other
        if others[take] < len(items):
            owner[others[take]] = costliest
    return [[items[k] for k in np.flatnonzero(owner[: len(items)] == p)] for p in range(len(parts))]
