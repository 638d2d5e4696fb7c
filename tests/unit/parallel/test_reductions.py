"""Reductions on one process; several ranks are in tests/distributed."""

from megatron_rl.algorithms.metrics import Metric
from megatron_rl.parallel.groups import reduce_counts, reduce_metrics


def test_without_a_group_the_own_metrics_are_the_result_in_alphabetical_order():
    reduced = reduce_metrics({"b": Metric("mean", 6.0, 4.0), "a": Metric("max", -1.0)}, None)
    assert list(reduced.items()) == [("a", -1.0), ("b", 1.5)]


def test_without_a_group_the_own_counts_are_the_result():
    assert reduce_counts([3, 0.5], None) == [3.0, 0.5]
    assert reduce_counts([], None) == []
