"""The data order is a function of the position, and each epoch is a permutation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.datasets import DataOrder
from megatron_rl.data.files import DataError


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 20),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    counts=st.lists(st.integers(0, 25), max_size=6),
)
def test_any_batch_sizes_draw_the_same_rows(num_rows: int, seed: int, shuffle: bool, counts: list[int]) -> None:
    order = DataOrder(num_rows, seed, shuffle)
    drawn: list[int] = []
    for count in counts:
        drawn += order.rows(len(drawn), count)
    assert drawn == order.rows(0, sum(counts))
    for epoch in range(len(drawn) // num_rows):
        assert sorted(drawn[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_without_shuffle_every_epoch_is_the_files_order() -> None:
    assert DataOrder(3, 0, False).rows(2, 5) == [2, 0, 1, 2, 0]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = DataOrder(100, 1, True).rows(0, 100), DataOrder(100, 1, True).rows(100, 100)
    other = DataOrder(100, 2, True).rows(0, 100)
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(100))}) == 4


def test_the_order_of_a_seed_never_changes() -> None:
    # Written down from a run: a stored position must mean the same rows in every later version.
    assert DataOrder(8, 1234, True).rows(0, 16) == [5, 6, 3, 7, 4, 1, 2, 0, 2, 0, 7, 6, 1, 4, 5, 3]


def test_every_row_comes_first_about_equally_often() -> None:
    # 2,000 epochs of 5 rows: 400 expected, standard deviation sqrt(2000 * 0.2 * 0.8) = 18; five of them are 90.
    firsts = [DataOrder(5, 0, True).rows(5 * epoch, 1)[0] for epoch in range(2000)]
    assert np.abs(np.bincount(firsts, minlength=5) - 400).max() < 90


def test_errors() -> None:
    with pytest.raises(DataError, match="at least one row, this one has 0"):
        DataOrder(0, 1, True)
    with pytest.raises(DataError, match="seed: -1 is given, it must not be negative"):
        DataOrder(1, -1, True)
