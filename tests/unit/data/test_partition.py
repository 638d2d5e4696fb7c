"""Parts hold everything once, and their costs are as even as theory, and better than differencing alone, says."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.packing import _largest_differencing, balanced_parts

Costs = list[int]


def largest(parts: list[list[int]], costs: Costs) -> int:
    return max(sum(costs[i] for i in part) for part in parts)


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(1, 30), min_size=1, max_size=7), num_parts=st.integers(1, 3))
def test_within_the_proven_bound_of_the_best_partition(costs: Costs, num_parts: int) -> None:
    best = min(
        max(sum(c for c, p in zip(costs, assignment, strict=True) if p == part) for part in range(num_parts))
        for assignment in itertools.product(range(num_parts), repeat=len(costs))
    )
    # Michiels et al. 2007, "Performance ratios of the Karmarkar-Karp differencing method": at most 4/3 - 1/(3m) of the
    # best for m parts.
    assert (
        3 * num_parts * largest(balanced_parts(range(len(costs)), costs, num_parts), costs)
        <= (4 * num_parts - 1) * best
    )


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=60), num_parts=st.integers(1, 16))
def test_everything_once_and_never_worse_than_differencing(costs: Costs, num_parts: int) -> None:
    items = range(len(costs))
    parts = balanced_parts(items, costs, num_parts)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for i in part) == list(items)
    assert sum(part != [] for part in parts) == min(num_parts, len(costs))
    if len(costs) > num_parts:
        assert largest(parts, costs) <= largest(_largest_differencing(items, costs, num_parts), costs)
    assert parts == balanced_parts(items, costs, num_parts)


def test_by_hand() -> None:
    # 8 7 6 5 4 into two: 8-7 -> 1, 6-5 -> 1, then 4-1 -> 3, 3-1 -> 2: parts {8,6} = 14 and {7,5,4} = 16 differ by 2.
    differenced = _largest_differencing(range(5), [8, 7, 6, 5, 4], 2)
    assert sorted(sorted(part) for part in differenced) == [[0, 2], [1, 3, 4]]
    # An exchange of 7 for 6 makes both 15.
    assert sorted(sorted(part) for part in balanced_parts(range(5), [8, 7, 6, 5, 4], 2)) == [[0, 1], [2, 3, 4]]
    assert balanced_parts([3, 1], [9, 9, 9, 9], 3) == [[3], [1], []]


@pytest.mark.parametrize(("per_part", "limit"), [(4, 0.01), (8, 0.002)])
def test_few_items_to_a_part(per_part: int, limit: float) -> None:
    """Lengths as GSM8K's: what differencing leaves over 64 ranks, several per cent of a rank, is exchanged away."""
    lengths = np.random.default_rng(0).lognormal(5.0, 0.35, 64 * per_part).astype(int).clip(48, 448).tolist()
    mean = sum(lengths) / 64
    differenced = largest(_largest_differencing(range(len(lengths)), lengths, 64), lengths)
    assert differenced / mean - 1 > limit
    assert largest(balanced_parts(range(len(lengths)), lengths, 64), lengths) / mean - 1 < limit
