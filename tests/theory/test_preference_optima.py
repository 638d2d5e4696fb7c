"""Where preference losses and reward models end up when policy and data are unlimited: the closed forms of the papers.

Six responses to one prompt, with the true chance p(i > j) for every pair; the loss is its expectation over all pairs,
minimised in float64.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.preference_loss import bradley_terry_loss, dpo_loss, implicit_rewards, ipo_loss, kto_loss
from tests.theory.tabular import minimum

N = 6
GENERATOR = torch.Generator().manual_seed(0)
REWARDS, REF_LOGITS, MU_LOGITS = torch.randn(3, N, generator=GENERATOR, dtype=torch.float64)
REFERENCE = REF_LOGITS.log_softmax(0)
MU = MU_LOGITS.softmax(0)
"""Distribution that the pairs' responses are drawn from."""
BRADLEY_TERRY = (REWARDS[:, None] - REWARDS).sigmoid()
CYCLIC = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
"""Preferences that no reward explains: 0 beats 1, 1 beats 2, 2 beats 0."""
WINNER, LOSER = (index.flatten() for index in torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij"))
# L-BFGS ends where the loss changes by less than its rounding, 1e-16: with curvatures of 1e-3 that is sqrt(1e-13).
OPTIMUM = {"atol": 2e-6, "rtol": 0.0}


def best_policy(pair_loss: Callable[..., Tensor], preferences: Tensor, mu: Tensor) -> Tensor:
    """Log-probs of the policy that minimises the expected loss over pairs from mu, with the given preferences."""
    size = len(mu)
    winner, loser = (i.flatten() for i in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    weights = (mu[:, None] * mu * preferences).flatten()
    reference = REFERENCE[:size].log_softmax(0)

    def loss(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(0)
        losses = pair_loss(log_probs[winner], log_probs[loser], reference[winner], reference[loser])
        return (weights * losses).sum()

    return minimum(loss, torch.zeros(size, dtype=torch.float64)).log_softmax(0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_ends_at_the_reference_times_exp_reward_over_beta(beta: float) -> None:
    got = best_policy(lambda *pair: dpo_loss(*pair, beta=beta), BRADLEY_TERRY, MU)
    torch.testing.assert_close(got, (REFERENCE + REWARDS / beta).log_softmax(0), **OPTIMUM)
    # Its implicit reward is the true one, up to one constant.
    difference = implicit_rewards(got, REFERENCE, beta=beta) - REWARDS
    torch.testing.assert_close(difference, difference[:1].expand(N), atol=4e-6, rtol=0.0)  # two of them


def test_that_policy_maximises_reward_minus_beta_kl() -> None:
    beta = 0.5

    def negative(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(0)
        return -(log_probs.exp() * (REWARDS - beta * (log_probs - REFERENCE))).sum()

    got = minimum(negative, torch.zeros(N, dtype=torch.float64)).log_softmax(0)
    torch.testing.assert_close(got, (REFERENCE + REWARDS / beta).log_softmax(0), **OPTIMUM)


def test_smoothed_dpo_ends_where_flipped_labels_put_it() -> None:
    # With smoothing eps the fitted chance is (1 - eps) p + eps (1 - p): the margin is its logit.
    eps, beta = 0.1, 0.5
    pair = torch.tensor([0.5, 0.5], dtype=torch.float64)
    preferences = torch.tensor([[0.5, 0.9], [0.1, 0.5]], dtype=torch.float64)
    got = best_policy(lambda *p: dpo_loss(*p, beta=beta, label_smoothing=eps), preferences, pair)
    reference = REFERENCE[:2].log_softmax(0)
    margin = float((got - reference)[0] - (got - reference)[1])
    assert margin == pytest.approx(math.log(0.82 / 0.18) / beta, abs=1e-6)  # 0.9 * 0.9 + 0.1 * 0.1 = 0.82


@pytest.mark.parametrize("preferences", [BRADLEY_TERRY, CYCLIC])
def test_ipo_ends_at_the_reference_times_exp_preference_over_tau(preferences: Tensor) -> None:
    tau, size = 0.3, len(preferences)
    mu = MU[:size] / MU[:size].sum()
    got = best_policy(lambda *pair: ipo_loss(*pair, tau=tau), preferences, mu)
    chance = preferences @ mu  # p(i > mu)
    torch.testing.assert_close(got, (REFERENCE[:size] + chance / tau).log_softmax(0), **OPTIMUM)


@pytest.mark.parametrize(
    ("psi", "loss"),
    [(lambda p: p, lambda *pair: ipo_loss(*pair, tau=0.3)), (torch.logit, lambda *pair: dpo_loss(*pair, beta=0.3))],
    ids=["identity", "logit"],
)
def test_both_maximise_their_psi_of_the_preference_minus_tau_kl(
    psi: Callable[[Tensor], Tensor], loss: Callable[..., Tensor]
) -> None:
    gain = psi(BRADLEY_TERRY) @ MU

    def negative(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(0)
        return -(log_probs.exp() * (gain - 0.3 * (log_probs - REFERENCE))).sum()

    wanted = minimum(negative, torch.zeros(N, dtype=torch.float64)).log_softmax(0)
    torch.testing.assert_close(best_policy(loss, BRADLEY_TERRY, MU), wanted, **OPTIMUM)


def test_certain_preferences_drive_dpo_off_and_leave_ipo_finite() -> None:
    certain = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.float64)
    pair = torch.tensor([0.5, 0.5], dtype=torch.float64)
    reference = REFERENCE[:2].log_softmax(0)

    def margin(log_probs: Tensor) -> float:
        return float((log_probs - reference)[0] - (log_probs - reference)[1])

    assert margin(best_policy(lambda *p: dpo_loss(*p, beta=0.5), certain, pair)) > 20
    # p(0 > mu) - p(1 > mu) = 0.75 - 0.25, over tau
    assert margin(best_policy(lambda *p: ipo_loss(*p, tau=0.25), certain, pair)) == pytest.approx(2.0, abs=1e-6)


def test_kto_raises_what_is_desirable() -> None:
    desirable = REWARDS > 0

    def loss(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(0)
        losses = kto_loss(log_probs, REFERENCE, desirable, 0.0, beta=0.5)
        return (MU * losses).sum()

    logits = REF_LOGITS.clone().requires_grad_()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(loss(logits), logits)
        logits = (logits - 2.0 * gradient).detach().requires_grad_()
    good = logits.softmax(0)[desirable].sum()
    assert good > REFERENCE.exp()[desirable].sum() + 0.1


def reward_model(weights: Tensor) -> Tensor:
    """Rewards [N] that minimise the Bradley-Terry loss with pair weights [N, N], centred."""

    def loss(rewards: Tensor) -> Tensor:
        return (weights.flatten() * bradley_terry_loss(rewards[WINNER], rewards[LOSER])).sum()

    rewards = minimum(loss, torch.zeros(N, dtype=torch.float64))
    return rewards - rewards.mean()


def test_a_reward_model_recovers_reward_differences() -> None:
    got = reward_model(MU[:, None] * MU * BRADLEY_TERRY)
    torch.testing.assert_close(got, REWARDS - REWARDS.mean(), **OPTIMUM)


def test_and_from_samples_within_its_standard_error() -> None:
    # 20,000 pairs. The estimate is asymptotically normal with the inverse Fisher information as covariance; 5 standard
    # errors of each of 6 numbers: one run in 3e5 fails by chance.
    count, generator = 20_000, torch.Generator().manual_seed(1)
    first, second = torch.multinomial(MU, 2 * count, replacement=True, generator=generator).view(2, count)
    wins = torch.rand(count, generator=generator, dtype=torch.float64) < BRADLEY_TERRY[first, second]
    weights = torch.zeros(N, N, dtype=torch.float64)
    weights.index_put_((first.where(wins, second), second.where(wins, first)), torch.tensor(1.0).double(), True)
    got = reward_model(weights / count)
    information = count * 2 * torch.diag((MU[:, None] * MU * BRADLEY_TERRY * BRADLEY_TERRY.T).sum(1))
    information -= count * 2 * MU[:, None] * MU * BRADLEY_TERRY * BRADLEY_TERRY.T
    errors = torch.linalg.pinv(information).diagonal().sqrt()  # of the centred rewards: pairs do not see the constant
    assert ((got - (REWARDS - REWARDS.mean())) / errors).abs().max() < 5
    assert errors.max() < 0.2


def test_a_monotonic_transformation_ranks_alike_and_trains_another_policy() -> None:
    transformed = REWARDS.exp()
    assert torch.equal(transformed.argsort(), REWARDS.argsort())
    policy, other = (REFERENCE + REWARDS).softmax(0), (REFERENCE + transformed).softmax(0)
    assert (policy - other).abs().max() > 0.05
    torch.testing.assert_close((REFERENCE + REWARDS + 7).softmax(0), policy)  # a constant is free
