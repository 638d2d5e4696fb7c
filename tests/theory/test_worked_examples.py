"""Worked examples that circulate in guides to these algorithms: the right ones come out, the loose ones do not."""

import math

import pytest
import torch

from megatron_rl.algorithms.advantages import RunningBaseline, generalized_advantages, group_relative_advantages
from megatron_rl.algorithms.importance import log_ratios
from megatron_rl.algorithms.kl import kl_estimate
from megatron_rl.algorithms.metrics import combine, masked_mean
from megatron_rl.algorithms.policy_loss import ppo_clip_loss, ppo_trajectory_loss
from megatron_rl.algorithms.preference_loss import dpo_loss


def surrogate(ratio: float, advantage: float) -> tuple[float, float]:
    """min(r A, clip(r, 0.8, 1.2) A), which is maximised, and its derivative by log pi."""
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = ppo_clip_loss(
        log_prob, torch.zeros(1), torch.tensor([advantage]).double(), clip_low=0.2, clip_high=0.2, dual_clip=None
    )
    loss.sum().backward()
    assert log_prob.grad is not None
    return -float(loss.detach()), -float(log_prob.grad)


def test_a_good_token_that_became_likelier_by_half_is_done() -> None:
    # P 0.3 -> 0.45, advantage 0.5: min(0.75, 0.6) = 0.6, no gradient left.
    assert surrogate(1.5, 0.5) == pytest.approx((0.6, 0.0))


def test_a_bad_token_that_lost_more_than_half_is_done() -> None:
    # P 0.2 -> 0.08, advantage -0.8: min(-0.32, -0.64) = -0.64. The minimum is the *more* negative one.
    assert surrogate(0.4, -0.8) == pytest.approx((-0.64, 0.0))


def test_outside_the_region_the_gradient_is_not_zero_on_both_sides() -> None:
    # It is drawn as a dead zone below 0.8 and above 1.2. A bad token that became likelier is still pushed down, and a
    # good one that became rarer is still pushed up.
    assert surrogate(1.5, -1.0) == pytest.approx((-1.5, -1.5))
    assert surrogate(0.5, 1.0) == pytest.approx((0.5, 0.5))


def test_three_rewards_against_their_average() -> None:
    # 8.5, 8.2, 8.0 with the average 8.23
    mean = (8.5 + 8.2 + 8.0) / 3
    got = RunningBaseline(mean, 1).advantages(torch.tensor([8.5, 8.2, 8.0]))
    assert [round(value, 2) for value in got.tolist()] == [0.27, -0.03, -0.23]


def test_eight_rewards_of_a_group() -> None:
    # Mean 0.55, population standard deviation 0.23; with that rounded: 1.52, 1.09, 0.65, 0.22, ...
    rewards = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.5, 0.4])
    got = group_relative_advantages(
        rewards, torch.zeros(8, dtype=torch.int64), normalize_by_std=True, std_epsilon=0.0, std_correction=0
    )
    printed = [1.52, 1.09, 0.65, 0.22, -1.09, -1.52, -0.22, -0.65]
    # sqrt(0.0525) is 0.2291, printed as 0.23: 0.4 % of up to 1.53
    assert got.tolist() == pytest.approx(printed, abs=0.008)


def test_the_kl_of_four_tokens() -> None:
    policy, reference = torch.tensor([-1.2, -2.5, -0.8, -0.3]).double(), torch.tensor([-1.3, -2.0, -0.9, -1.5]).double()
    assert kl_estimate(policy, reference, "k1").tolist() == pytest.approx([0.1, -0.5, 0.1, 1.2])
    assert float(kl_estimate(policy, reference, "k1").sum()) == pytest.approx(0.9)
    # k3 = exp(-d) - 1 + d. It is printed as [0.005, 0.132, 0.005, 0.515], 0.657 together: neither these values, nor
    # those of the printed formula exp(d) - 1 - d, which is biased (`test_kl_sampling`).
    k3 = kl_estimate(policy, reference, "k3")
    assert k3.tolist() == pytest.approx([0.00484, 0.14872, 0.00484, 0.50119], abs=1e-5)
    assert float(k3.sum()) == pytest.approx(0.65959, abs=1e-5)
    difference = policy - reference
    assert float((difference.exp() - 1 - difference).sum()) == pytest.approx(1.23699, abs=1e-5)


def test_the_limits_of_gae() -> None:
    # One completion of three tokens, reward 1 at its end, values 0.2, 0.5, 0.9, gamma 1: lambda 0 is the TD error,
    # lambda 1 the return less the value.
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.2, 0.5, 0.9])
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    for lam, expected in ((0.0, [0.3, 0.4, 0.1]), (1.0, [0.8, 0.5, 0.1])):
        advantages, _ = generalized_advantages(rewards, values, torch.ones(3), bounds, gamma=1.0, lam=lam)
        assert advantages.tolist() == pytest.approx(expected)


def test_the_ratio_of_a_completion_is_the_product_of_its_tokens() -> None:
    # "We sum log-probs over all tokens": one ratio for the whole, clipped as a whole; per token it is another loss.
    log_probs, old = torch.tensor([0.15, 0.15]).double(), torch.zeros(2).double()
    mask, cu_seqlens, advantages = torch.ones(2), torch.tensor([0, 2], dtype=torch.int32), torch.ones(2).double()
    ratio = log_ratios(log_probs, old, mask, cu_seqlens, level="sequence").exp()
    assert ratio.tolist() == pytest.approx([math.exp(0.3)] * 2)
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    whole = ppo_trajectory_loss(log_probs, old, advantages, mask, cu_seqlens, **clip)
    tokens = ppo_clip_loss(log_probs, old, advantages, **clip, dual_clip=None)
    assert whole.tolist() == pytest.approx([-1.2, -1.2])  # e^0.3 = 1.35 is clipped
    assert tokens.tolist() == pytest.approx([-math.exp(0.15)] * 2)  # 1.16 each is not


def test_dpo_learns_most_from_the_pairs_that_it_ranks_wrongly() -> None:
    # The weight is beta sigmoid(-beta m); printed as beta sigmoid(beta m) it would grow with what is settled.
    chosen = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    none = torch.zeros(3, dtype=torch.float64)
    dpo_loss(chosen, none, none, none, beta=1.0).sum().backward()
    assert chosen.grad is not None
    assert (-chosen.grad).tolist() == pytest.approx([1 / (1 + math.exp(m)) for m in (-4.0, 0.0, 4.0)])


def test_the_mean_of_the_ranks_means_is_not_the_mean() -> None:
    # "global = (1/N) sum of local metrics": wrong as soon as ranks hold unequally many tokens.
    first, second = (
        {"x": masked_mean(v, torch.ones(len(v)))} for v in (torch.tensor([1.0, 1.0, 1.0]), torch.tensor([9.0]))
    )
    assert combine(first, second)["x"].result() == 3.0
    assert (first["x"].result() + second["x"].result()) / 2 == 5.0
