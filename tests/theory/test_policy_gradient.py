"""The policy-gradient theorem and what each baseline does to it, by enumeration and by sampling.

Groups of K completions are enumerated too: all C^K of them, each with its probability.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import (
    RunningBaseline,
    generalized_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    whiten,
)
from megatron_rl.algorithms.metrics import Moments
from megatron_rl.algorithms.policy_loss import ppo_clip_loss, reinforce_loss
from megatron_rl.algorithms.reward_shaping import terminal_rewards
from tests.theory.tabular import TokenMDP, gradient_of, packed

MDP = TokenMDP(3, 2, lambda c: float(c == (2, 1)) + 0.3 * c[0] - 0.2 * (c[0] == c[1]) + 1.0)
LOGITS = MDP.logits(seed=0)
EXACT = MDP.gradient(LOGITS)
NUM = len(MDP.completions)
EQUAL = {"atol": 1e-7, "rtol": 0.0}  # advantages are rounded to float32, 6e-8 of at most 2
Advantages = Callable[[Tensor, Tensor], Tensor]


def expected_gradient(advantages: Tensor, which: Tensor, weights: Tensor) -> Tensor:
    """Sum over completions of weight x gradient of the loss, ascending: advantages [N] or [N, L]."""
    per_token = advantages.double().reshape(len(which), -1).expand(-1, MDP.length)

    def loss(logits: Tensor) -> Tensor:
        losses = reinforce_loss(MDP.token_log_probs(logits, which).flatten(), per_token.flatten())
        return (losses.reshape(len(which), -1).sum(1) * weights).sum()

    return -gradient_of(loss, LOGITS)


def over_groups(size: int, estimator: Advantages) -> Tensor:
    """E of the estimator's gradient over all groups of `size` completions."""
    groups = torch.tensor(list(itertools.product(range(NUM), repeat=size)))
    chance = MDP.probabilities(LOGITS)[groups].prod(1)
    ids = torch.arange(len(groups))[:, None].expand(-1, size).flatten()
    advantages = estimator(MDP.rewards[groups].flatten().float(), ids)
    return expected_gradient(advantages, groups.flatten(), (chance / size)[:, None].expand(-1, size).flatten())


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_reinforce_is_unbiased_with_any_constant_baseline() -> None:
    p, everything = MDP.probabilities(LOGITS), torch.arange(NUM)
    for baseline in (0.0, 0.7, -30.0):
        got = expected_gradient(RunningBaseline(baseline, 1).advantages(MDP.rewards), everything, p)
        torch.testing.assert_close(got, EXACT, atol=4e-6, rtol=0.0)  # float32 rounding of advantages near 30: 2e-6


def test_a_baseline_that_knows_the_action_biases() -> None:
    p, everything = MDP.probabilities(LOGITS), torch.arange(NUM)
    first = torch.tensor([c[0] for c in MDP.completions], dtype=torch.float64)
    got = expected_gradient(MDP.rewards - 0.3 * first, everything, p)
    assert (got - EXACT).abs().max() > 0.01


@pytest.mark.parametrize("size", [2, 3])
def test_leave_one_out_is_unbiased_and_the_group_mean_k_minus_1_over_k_of_it(size: int) -> None:
    torch.testing.assert_close(over_groups(size, leave_one_out_advantages), EXACT, **EQUAL)

    def dr_grpo(rewards: Tensor, ids: Tensor) -> Tensor:
        return group_relative_advantages(rewards, ids, normalize_by_std=False, std_epsilon=0.0)

    torch.testing.assert_close(over_groups(size, dr_grpo), EXACT * (size - 1) / size, **EQUAL)


def test_dividing_by_the_groups_std_turns_the_gradient() -> None:
    def grpo(rewards: Tensor, ids: Tensor) -> Tensor:
        return group_relative_advantages(rewards, ids, normalize_by_std=True, std_epsilon=1e-6)

    got = over_groups(3, grpo)
    # Not a matter of scale: the direction differs, and still the reward rises along it.
    assert 0.5 < cosine(got, EXACT) < 0.999


def whitened_gradient(probabilities: Tensor, rewards: Tensor, size: int) -> Tensor:
    """E of a bandit's gradient over all batches of `size` whitened rewards, by how often each arm is in them."""
    total = torch.zeros_like(probabilities)
    for first, second in itertools.product(range(size + 1), repeat=2):
        if first + second > size:
            continue
        counts = torch.tensor([first, second, size - first - second], dtype=torch.float64)
        chance = (torch.lgamma(torch.tensor(size + 1.0)) - torch.lgamma(counts + 1).sum()).exp()
        advantages = whiten(rewards, counts, Moments.of(rewards, counts), epsilon=1e-9)
        # sum_k counts_k A_k (onehot_k - p) / size; whitened advantages add up to 0
        total += chance * (probabilities**counts).prod() * counts * advantages / size
    return total


def test_whitening_biases_by_a_part_that_vanishes_with_the_batch() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    exact = probabilities * (rewards - (probabilities * rewards).sum())
    # The sine of the angle to the true gradient; O(1 / size), so four times the batch has about a quarter of it.
    angles = [
        math.sqrt(1 - cosine(whitened_gradient(probabilities, rewards, size), exact) ** 2) for size in (4, 16, 64)
    ]
    assert angles[0] > 2.5 * angles[1] > 2.5**2 * angles[2] > 1e-4


def test_gae_is_unbiased_with_the_true_values_and_with_wrong_ones_only_at_lambda_1() -> None:
    p, everything = MDP.probabilities(LOGITS), torch.arange(NUM)
    mask, cu_seqlens = packed(NUM, MDP.length)
    rewards = terminal_rewards(MDP.rewards, mask, cu_seqlens)
    true = MDP.state_values(LOGITS)
    wrong = true + torch.tensor([0.5, -1.0, 0.0, 1.0])

    def bias(values: Tensor, lam: float) -> float:
        advantages, _ = generalized_advantages(
            rewards, values[MDP.states].flatten(), mask, cu_seqlens, gamma=1.0, lam=lam
        )
        return float((expected_gradient(advantages.reshape(NUM, -1), everything, p) - EXACT).abs().max())

    for lam in (0.0, 0.5, 0.95, 1.0):
        assert bias(true, lam) < 1e-7  # float32 rounding of the advantages
    assert bias(wrong, 1.0) < 1e-6
    assert bias(wrong, 0.0) > 10 * bias(wrong, 0.95) > 1e-3


# Each of the 12 components of a Monte-Carlo mean is to be within 5 standard errors: one run in 1.4e5 fails by chance.
CONFIDENCE = 5.0
SAMPLES = 20_000


def z_scores(advantages_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Deviations of a Monte-Carlo gradient from the exact one, in standard errors, component by component."""
    which = MDP.sample(LOGITS, SAMPLES, torch.Generator().manual_seed(0))
    # grad log pi of every completion, one by one, from the loss with advantage 1.
    scores = torch.stack(
        [expected_gradient(torch.ones(1), torch.tensor([c]), torch.ones(1)) for c in range(NUM)]
    ).reshape(NUM, -1)
    estimates = scores[which] * advantages_of(MDP.rewards[which])[:, None]
    error = estimates.std(0) / math.sqrt(SAMPLES)
    return (estimates.mean(0) - EXACT.flatten()) / error


@pytest.mark.parametrize(
    "baseline", [lambda r: r, lambda r: r - 1.3, lambda r: leave_one_out_advantages(r, torch.arange(SAMPLES) // 4)]
)
def test_sampled_gradients_are_unbiased(baseline: Callable[[Tensor], Tensor]) -> None:
    assert z_scores(baseline).abs().max() < CONFIDENCE


def test_the_experiment_sees_a_bias() -> None:
    # The group's mean, with its factor of 3/4; and a baseline of the completion's own reward.
    def mean(rewards: Tensor) -> Tensor:
        return group_relative_advantages(rewards, torch.arange(SAMPLES) // 4, normalize_by_std=False, std_epsilon=0.0)

    assert z_scores(mean).abs().max() > CONFIDENCE
    assert z_scores(lambda rewards: rewards - rewards.square() / 4).abs().max() > CONFIDENCE


def test_a_baseline_lowers_the_variance() -> None:
    p = MDP.probabilities(LOGITS)
    scores = torch.stack([expected_gradient(torch.ones(1), torch.tensor([c]), torch.ones(1)) for c in range(NUM)])

    def variance(advantages: Tensor) -> float:
        estimates = scores.reshape(NUM, -1) * advantages[:, None]
        return float((p[:, None] * (estimates - EXACT.flatten()).square()).sum())

    assert variance(MDP.rewards - MDP.value(LOGITS)) < 0.3 * variance(MDP.rewards)


def test_the_printed_gradient_of_the_clipped_objective_is_not_its_gradient() -> None:
    # r A grad log pi inside the region, 0 where clipped; grad log pi min(r A, clip(r) A) would be 1.2 A where clipped.
    log_probs = torch.tensor([0.0, math.log(1.5)], dtype=torch.float64, requires_grad=True)
    ppo_clip_loss(
        log_probs, torch.zeros(2), torch.ones(2), clip_low=0.2, clip_high=0.2, dual_clip=None
    ).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-1.0, 0.0]
