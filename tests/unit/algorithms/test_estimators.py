"""Leave-one-out, whitening over the batch, running baselines, and groups without contrast."""

import itertools
import math

import pytest
import torch

from megatron_rl.algorithms.advantages import (
    RunningBaseline,
    group_relative_advantages,
    informative,
    leave_one_out_advantages,
    whiten,
)
from megatron_rl.algorithms.metrics import Moments

NAN = float("nan")


def test_leave_one_out_by_hand() -> None:
    # {1, 2, 6} of group 4: 1 - 8/2, 2 - 7/2, 6 - 3/2. {5} alone: 0. {0, 1}: -1, 1.
    rewards, ids = torch.tensor([1.0, 5.0, 2.0, 0.0, 6.0, 1.0]), torch.tensor([4, 9, 4, 1, 4, 1])
    assert leave_one_out_advantages(rewards, ids).tolist() == [-3.0, 0.0, -1.5, -1.0, 4.5, 1.0]


def test_leave_one_out_is_the_group_mean_form_times_k_over_k_minus_1() -> None:
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3])
    sizes = torch.bincount(ids)[ids]
    plain = group_relative_advantages(rewards, ids, normalize_by_std=False, std_epsilon=0.0)
    # Each is rounded once to float32.
    torch.testing.assert_close(
        leave_one_out_advantages(rewards, ids), plain * sizes / (sizes - 1), atol=1e-7, rtol=3e-7
    )


@pytest.mark.parametrize("size", [1, 2, 13])
def test_equal_rewards_have_advantage_exactly_0(size: int) -> None:
    got = leave_one_out_advantages(torch.full((size,), 0.1), torch.zeros(size, dtype=torch.int64))
    assert got.tolist() == [0.0] * size


def test_informative_groups_have_two_different_rewards() -> None:
    rewards, ids = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 1.0]), torch.tensor([0, 1, 0, 1, 2, 0])
    assert informative(rewards, ids).tolist() == [False, True, False, True, False, False]
    assert torch.equal(
        informative(rewards, ids),
        group_relative_advantages(rewards, ids, normalize_by_std=False, std_epsilon=0.0) != 0,
    )


def test_whitening_by_hand_and_masked() -> None:
    # {1, 3}: mean 2, population std 1 (the sample's would be 1.414)
    values, mask = torch.tensor([1.0, NAN, 3.0]), torch.tensor([1.0, 0.0, 1.0])
    moments = Moments.of(values, mask)
    assert (moments.count, moments.mean, moments.std) == (2.0, 2.0, 1.0)
    assert whiten(values, mask, moments, epsilon=0.0).tolist() == [-1.0, 0.0, 1.0]
    assert whiten(values, mask, moments, epsilon=1.0).tolist() == [-0.5, 0.0, 0.5]
    assert whiten(values, mask, moments, subtract_mean=False, epsilon=0.0).tolist() == [1.0, 0.0, 3.0]


def test_whitening_is_of_the_whole_batch_however_it_is_split() -> None:
    values = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 3 + 100
    mask = (torch.arange(24) % 5 > 0).float()
    whole = whiten(values, mask, Moments.of(values, mask), epsilon=1e-6)
    for cuts in itertools.combinations(range(1, 24, 3), 2):
        parts = list(zip(values.tensor_split(cuts), mask.tensor_split(cuts), strict=True))
        moments = sum((Moments.of(*part) for part in parts), Moments())
        split = torch.cat([whiten(*part, moments, epsilon=1e-6) for part in parts])
        # float64 moments in another order, then one rounding to float32.
        torch.testing.assert_close(split, whole, atol=1e-6, rtol=2e-7)
    assert whole[mask > 0].std(correction=0) == pytest.approx(1.0, abs=1e-5)  # the epsilon over the std of 3
    # The bug that the moments prevent: each part by its own.
    local = torch.cat([whiten(*part, Moments.of(*part), epsilon=1e-6) for part in parts])
    assert (local - whole).abs().max() > 0.1


def test_equal_values_whiten_to_exactly_0() -> None:
    values = torch.full((13,), 0.1)
    parts = [Moments.of(part, torch.ones(len(part))) for part in values.split(4)]
    moments = sum(parts, Moments())
    assert moments.m2 == 0.0
    assert whiten(values, torch.ones(13), moments, epsilon=0.0).tolist() == [0.0] * 13


def test_running_baseline_is_of_the_steps_before() -> None:
    baseline = RunningBaseline()
    assert baseline.advantages(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]
    baseline = baseline.after(4.0, 2, decay=0.75)  # the first mean is taken whole: 2
    assert baseline.advantages(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]
    baseline = baseline.after(18.0, 3, decay=0.75)  # 0.75 * 2 + 0.25 * 6
    assert (baseline.mean, baseline.num_steps) == (3.0, 2)
    assert baseline.after(0.0, 0, decay=0.75) == baseline


def test_a_bad_reward_is_named() -> None:
    for estimator in (leave_one_out_advantages, informative):
        with pytest.raises(ValueError, match=r"rewards\[1\] is inf \(group 7\); must be finite"):
            estimator(torch.tensor([0.0, math.inf]), torch.tensor([7, 7]))
