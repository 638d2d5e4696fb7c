"""Group-relative advantages against hand-computed groups, and against every reordering of the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.algorithms.advantages import group_relative_advantages, length_weighted_advantages, whiten
from megatron_rl.algorithms.metrics import Moments

EIGHT_REWARDS = [0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.5, 0.4]


def advantages(rewards, group_ids, *, normalize_by_std=True, std_epsilon=0.0, std_correction=0):
    return group_relative_advantages(
        torch.tensor(rewards),
        torch.tensor(group_ids),
        normalize_by_std=normalize_by_std,
        std_epsilon=std_epsilon,
        std_correction=std_correction,
    )


def test_eight_rewards_are_z_scores_with_the_population_std():
    # mean 4.4 / 8 = 0.55; squared deviations 2 (0.35^2 + 0.25^2 + 0.15^2 + 0.05^2) = 0.42; std sqrt(0.42 / 8) = 0.22913
    expected = [1.5275252, 1.0910895, 0.6546537, 0.2182179, -1.0910895, -1.5275252, -0.2182179, -0.6546537]
    got = advantages(EIGHT_REWARDS, [0] * 8)
    # The rewards are rounded to float32 (6e-8), then divided by 0.23; the expected numbers have 7 decimals.
    torch.testing.assert_close(got, torch.tensor(expected), atol=5e-7, rtol=0)
    # The sample std, sqrt(0.42 / 7), would give 1.4288690 for the first.
    assert abs(float(got[0]) - 1.4288690) > 0.09


def test_without_std_advantages_are_the_deviations():
    got = advantages(EIGHT_REWARDS, [0] * 8, normalize_by_std=False, std_epsilon=1e-6)
    expected = torch.tensor([0.35, 0.25, 0.15, 0.05, -0.25, -0.35, -0.05, -0.15])
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)  # float32 rounding of the rewards, 6e-8


def test_interleaved_groups_of_unequal_size():
    # group 7: {1, 3}, mean 2, std 1. group 3: {0, 1, 2}, mean 1, std sqrt(2/3). group 9: {5} alone.
    rewards, ids = [1.0, 0.0, 3.0, 1.0, 2.0, 5.0], [7, 3, 7, 3, 3, 9]
    assert advantages(rewards, ids, normalize_by_std=False).tolist() == [-1, -1, 1, 0, 1, 0]
    z = math.sqrt(1.5)
    torch.testing.assert_close(advantages(rewards, ids), torch.tensor([-1, -z, 1, 0, z, 0]), atol=1e-7, rtol=0)


def test_epsilon_is_added_to_the_std():
    # {0, 1}: deviations -0.5 and 0.5, std 0.5; 0.5 / (0.5 + 0.5) = 0.5. Added to the variance it would give 0.577.
    assert advantages([0.0, 1.0], [0, 0], std_epsilon=0.5).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("std_epsilon", [0.0, 1e-12, 1e-6])
@pytest.mark.parametrize("reward", [0.0, 0.1, -1 / 3, 1e-30, 3.4e38])
def test_equal_rewards_have_advantage_exactly_0(reward, std_epsilon):
    for size in range(1, 40):
        got = advantages([reward] * size + [1.0, 2.0], [5] * size + [1, 1], std_epsilon=std_epsilon)
        assert got[:size].tolist() == [0.0] * size


def test_float32_arithmetic_would_not_give_0():
    # The variant that the float64 arithmetic guards against: float32 rounds the mean of equal rewards, and the division
    # by an equally tiny std makes the rounding error an advantage of about 1.
    rewards = torch.full((13,), 0.1)
    deviations = rewards - sum(rewards) / 13
    assert (deviations / (deviations.square().mean().sqrt() + 1e-12)).abs().max() > 0.9


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-16, 16), st.integers(0, 3)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_order_of_the_batch_and_other_groups_do_not_matter(items, random, normalize):
    rewards, ids = [reward / 8 for reward, _ in items], [group for _, group in items]
    whole = advantages(rewards, ids, normalize_by_std=normalize)
    order = list(range(len(items)))
    random.shuffle(order)
    shuffled = advantages([rewards[i] for i in order], [ids[i] for i in order], normalize_by_std=normalize)
    # Only the order of float64 sums differs, which float32 rounding hides but for its last bit.
    torch.testing.assert_close(shuffled, whole[order], atol=1e-7, rtol=2e-7)
    for group in set(ids):
        members = [i for i in order if ids[i] == group]
        alone = advantages([rewards[i] for i in members], [0] * len(members), normalize_by_std=normalize)
        torch.testing.assert_close(alone, whole[members], atol=1e-7, rtol=2e-7)


def test_a_reward_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"rewards\[2\] is nan \(group 4\); must be finite"):
        advantages([0.0, 1.0, float("nan")], [4, 4, 4])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"rewards \(2,\) and group_ids \(3,\) must both be \[N\]"):
        advantages([0.0, 1.0], [0, 0, 0])


@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("value", [1.0, 0.1, -1.0, 1e-8, 1e8, 0.0])
@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_a_spread_of_zero_is_no_scale(value: float, count: int, subtract_mean: bool) -> None:
    values = torch.full((count,), value)
    ones = torch.ones(count)
    parts = [Moments.of(values[i : i + 2], ones[i : i + 2]) for i in range(0, count, 2)]
    got = whiten(values, ones, sum(parts, Moments()), subtract_mean=subtract_mean, epsilon=1e-6)
    expected = torch.zeros(count) if subtract_mean else values
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7 * abs(value))  # an eps of float32


@pytest.mark.parametrize("correction", [0, 1])
def test_the_groups_standard_deviation_is_torchs(correction: int) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.25, 3.0, -1.0, 0.5, 0.5, 2.0])
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
    got = group_relative_advantages(rewards, ids, normalize_by_std=True, std_epsilon=1e-6, std_correction=correction)
    for group in range(3):
        of_group = rewards[ids == group].double()
        expected = (of_group - of_group.mean()) / (of_group.std(correction=correction) + 1e-6)
        torch.testing.assert_close(got[ids == group], expected.float())
    assert got[5:].tolist() == [0.0, 0.0, 0.0]  # equal rewards, and a group of one


def test_the_length_weighted_baseline() -> None:
    rewards, ids = torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([7, 7, 3, 3])
    got = length_weighted_advantages(rewards, ids, torch.tensor([1, 3, 2, 9]))
    assert got.tolist() == [0.75, -0.25, 0.0, 0.0]  # baseline (1 x 1 + 3 x 0) / 4
    same = length_weighted_advantages(rewards, ids, torch.tensor([4, 4, 4, 4]))
    assert torch.equal(same, group_relative_advantages(rewards, ids, normalize_by_std=False, std_epsilon=0.0))
