"""Metrics combine as their kinds say, and nothing masked enters them."""

import math

import pytest
import torch

from megatron_rl.algorithms.metrics import Metric, combine, masked_max, masked_mean, masked_min

NAN = float("nan")


def test_a_mean_is_over_the_whole_and_not_a_mean_of_means():
    # {1, 2, 3} and {10}: 16 / 4 = 4. The mean of the two means would be 6.
    first = masked_mean(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
    assert (first + masked_mean(torch.tensor([10.0]), torch.ones(1))).result() == 4.0


def test_masked_values_may_be_anything():
    values, mask = torch.tensor([NAN, -2.0, 5.0, float("inf")]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert masked_mean(values, mask).result() == 1.5
    assert masked_max(values, mask).result() == 5.0
    assert masked_min(values, mask).result() == -2.0


def test_nothing_is_the_neutral_element():
    nothing, ones = torch.zeros(0), torch.ones(1)
    assert math.isnan(masked_mean(nothing, nothing).result())
    assert (masked_mean(nothing, nothing) + masked_mean(ones, ones)).result() == 1.0
    assert (masked_max(nothing, nothing) + masked_max(-ones, ones)).result() == -1.0
    assert (masked_min(ones, 0 * ones) + masked_min(ones, ones)).result() == 1.0


def test_combine_merges_by_name():
    merged = combine(
        {"a": Metric("sum", 1.0), "b": Metric("min", 3.0)}, {"b": Metric("min", 2.0), "c": Metric("max", 9.0)}
    )
    assert {name: metric.result() for name, metric in merged.items()} == {"a": 1.0, "b": 2.0, "c": 9.0}


def test_kinds_do_not_mix():
    with pytest.raises(ValueError, match="cannot combine a sum with a mean metric"):
        Metric("sum", 1.0) + Metric("mean", 1.0)
