"""Preferences beyond the tests that every loss has: from packed tokens to pairs, and the ends of the ranges."""

import math

import pytest
import torch

from megatron_rl.algorithms.aggregation import sequence_means, sequence_sums
from megatron_rl.algorithms.preference_loss import (
    bradley_terry_loss,
    dpo_loss,
    implicit_rewards,
    kto_reference_kl,
    orpo_loss,
    preference_metrics,
    process_reward_metrics,
)
from megatron_rl.algorithms.supervised_loss import focal_loss

NAN = float("nan")


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_dpo_at_initialisation_is_ln_2(beta: float) -> None:
    chosen, rejected = torch.tensor([-7.0, -300.0]), torch.tensor([-9.0, -20.0])
    got = dpo_loss(chosen, rejected, chosen, rejected, beta=beta)
    assert got.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-7)  # float32


def test_packed_tokens_to_pairs_summed_and_averaged() -> None:
    # Chosen: tokens -1 and -2 after a prompt; rejected: one token -4.
    log_probs = torch.tensor([NAN, -1.0, -2.0, -4.0], requires_grad=True)
    mask, cu_seqlens = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 3, 4], dtype=torch.int32)
    chosen, rejected = sequence_sums(log_probs, mask, cu_seqlens)
    none = torch.zeros(1, dtype=torch.float64)
    dpo_loss(chosen[None], rejected[None], none, none, beta=1.0).sum().backward()
    slope = 1 / (1 + math.exp(-3 + 4))  # sigmoid(-m), m = -3 + 4
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([0.0, -slope, -slope, slope], rel=1e-6)
    assert sequence_means(log_probs, mask, cu_seqlens).tolist() == [-1.5, -4.0]


def test_implicit_reward_by_hand() -> None:
    assert implicit_rewards(torch.tensor([-1.0]), torch.tensor([-3.0]), beta=0.5).tolist() == [1.0]


def test_the_reference_kl_of_kto_is_a_mean_over_the_batch_and_not_negative() -> None:
    assert kto_reference_kl(6.0, 4.0) == 1.5
    assert kto_reference_kl(-6.0, 4.0) == 0.0
    assert kto_reference_kl(0.0, 0.0) == 0.0


def test_orpo_of_a_certain_completion_is_finite() -> None:
    chosen = torch.zeros(1, requires_grad=True)  # probability 1: odds would be infinite
    loss = orpo_loss(chosen, torch.tensor([-1.0]), odds_coefficient=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()


def test_ranking_metrics_count_ties_half() -> None:
    got = preference_metrics(
        torch.tensor([1.0, 0.0, 2.0, NAN]), torch.tensor([0.0, 0.0, 5.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    )
    assert {name: round(metric.result(), 9) for name, metric in got.items()} == {
        "preference/accuracy": 0.5,
        "preference/margin": round(-2 / 3, 9),
        "preference/chosen_reward": 1.0,
        "preference/rejected_reward": round(5 / 3, 9),
    }


def test_the_log_of_a_sigmoid_overflows_and_the_log_sigmoid_does_not() -> None:
    difference = torch.tensor([-110.0])
    assert torch.isinf(-torch.log(torch.sigmoid(difference))).all()
    assert bradley_terry_loss(difference, torch.zeros(1)).tolist() == [110.0]


def test_process_reward_accuracy() -> None:
    got = process_reward_metrics(
        torch.tensor([2.0, -1.0, 3.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 0.9]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    )
    assert got["process_reward/accuracy"].result() == pytest.approx(2 / 3)


def test_label_smoothing_is_below_a_half() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5; must be in \[0, 0\.5\)"):
        dpo_loss(one, one, one, one, beta=1.0, label_smoothing=0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_at_both_ends(gamma: float) -> None:
    # Certain: nothing to learn, and no infinite slope of a root. Impossible: the likelihood's own loss.
    log_probs = torch.tensor([0.0, -50.0], requires_grad=True)
    losses = focal_loss(log_probs, gamma=gamma)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 50.0]
    assert log_probs.grad is not None
    assert torch.isfinite(log_probs.grad).all()
    assert float(log_probs.grad[1]) == -1.0
