"""Importance weights make samples of one policy count for another, exactly; and what each shortcut costs."""

import torch
from torch import Tensor

from megatron_rl.algorithms.importance import Level, Method, correction_weights, log_ratios
from megatron_rl.algorithms.kl import exact_kl, kl_estimate, weighted_kl_estimate
from megatron_rl.algorithms.policy_loss import importance_weighted_loss, ppo_trajectory_loss, reinforce_loss
from tests.theory.tabular import TokenMDP, gradient_of, packed

MDP = TokenMDP(3, 2, lambda c: float(c == (2, 1)) + 0.3 * c[0] - 0.2 * (c[0] == c[1]))
NUM = len(MDP.completions)
TARGET = MDP.logits(seed=0)
BEHAVIOUR = TARGET + 0.3 * MDP.logits(seed=1)
REFERENCE = MDP.logits(seed=2)
EXACT = MDP.gradient(TARGET)
MASK, CU_SEQLENS = packed(NUM, MDP.length)
PER_TOKEN = MDP.rewards[:, None].expand(-1, MDP.length).flatten()


def expectation(losses: Tensor, policy: Tensor) -> Tensor:
    """E of the sum over a completion's tokens, under samples of a policy; per-token losses [C L]."""
    return (MDP.probabilities(policy).detach() * losses.reshape(NUM, -1).sum(1)).sum()


def corrected(level: Level, method: Method, low: float, high: float) -> Tensor:
    """E over the behaviour's samples of the gradient of REINFORCE with weights."""
    behaviour = MDP.token_log_probs(BEHAVIOUR).flatten()

    def loss(logits: Tensor) -> Tensor:
        log_probs = MDP.token_log_probs(logits).flatten()
        ratio = log_ratios(log_probs.detach(), behaviour, MASK, CU_SEQLENS, level=level)
        weights = correction_weights(ratio, method=method, low=low, high=high)
        return expectation(weights * reinforce_loss(log_probs, PER_TOKEN), BEHAVIOUR)

    return -gradient_of(loss, TARGET)


def error(gradient: Tensor) -> float:
    return float((gradient - EXACT).norm() / EXACT.norm())


def test_sequence_weights_are_exact() -> None:
    assert error(corrected("sequence", "truncate", 0.0, 1e6)) < 1e-13


def test_without_weights_or_with_others_it_is_another_gradient() -> None:
    def loss(logits: Tensor) -> Tensor:
        return expectation(reinforce_loss(MDP.token_log_probs(logits).flatten(), PER_TOKEN), BEHAVIOUR)

    none = error(-gradient_of(loss, TARGET))
    token = error(corrected("token", "truncate", 0.0, 1e6))
    assert none > 0.1
    assert 0.01 < token < none  # right for the token given its prefix, but prefixes are the behaviour's


def test_truncation_masking_and_rejection_trade_bias_for_bounded_weights() -> None:
    for method in ("truncate", "mask", "reject"):
        assert error(corrected("sequence", method, 0.5, 1.5)) > 0.01
    # A wider bound, less bias.
    assert error(corrected("sequence", "truncate", 0.0, 1.5)) > error(corrected("sequence", "truncate", 0.0, 2.5))


def test_the_trajectory_surrogate_is_exact_off_policy_and_the_token_surrogate_at_its_centre() -> None:
    old = MDP.token_log_probs(BEHAVIOUR).flatten()

    def trajectory(logits: Tensor) -> Tensor:
        losses = ppo_trajectory_loss(
            MDP.token_log_probs(logits).flatten(), old, PER_TOKEN, MASK, CU_SEQLENS, clip_low=1.0, clip_high=1e6
        )
        return expectation(losses / MDP.length, BEHAVIOUR)  # one term per completion

    assert error(-gradient_of(trajectory, TARGET)) < 1e-13

    def token(logits: Tensor) -> Tensor:
        return expectation(importance_weighted_loss(MDP.token_log_probs(logits).flatten(), old, PER_TOKEN), BEHAVIOUR)

    assert error(-gradient_of(token, TARGET)) > 0.01
    at_centre = -gradient_of(token, BEHAVIOUR)
    torch.testing.assert_close(at_centre, MDP.gradient(BEHAVIOUR), atol=1e-13, rtol=0.0)


def completion_kl(logits: Tensor) -> Tensor:
    """KL of completions from the reference, exactly: sum over prefixes of their chance times their token's KL."""
    return exact_kl(MDP.token_log_probs(logits).sum(1), MDP.token_log_probs(REFERENCE).sum(1))


def test_exact_kl_of_the_tokens_adds_up_to_that_of_completions() -> None:
    per_state = exact_kl(TARGET.log_softmax(1), REFERENCE.log_softmax(1))
    chain = expectation(per_state[MDP.states].flatten(), TARGET)
    torch.testing.assert_close(chain, completion_kl(TARGET), atol=1e-14, rtol=0.0)


def kl_gradient(policy: Tensor, weighted: bool, estimator: str) -> Tensor:
    old = MDP.token_log_probs(policy).flatten()
    ref = MDP.token_log_probs(REFERENCE).flatten()

    def loss(logits: Tensor) -> Tensor:
        log_probs = MDP.token_log_probs(logits).flatten()
        if weighted:
            return expectation(weighted_kl_estimate(log_probs, old, ref, estimator), policy)  # type: ignore[arg-type]
        return expectation(kl_estimate(log_probs, ref, estimator), policy)  # type: ignore[arg-type]

    return gradient_of(loss, TARGET)


def test_the_weighted_estimators_have_the_gradient_of_the_kl_of_each_position() -> None:
    # Of each position's own distribution, after prefixes of the sampling policy: what any per-token penalty can be.
    for policy in (TARGET, BEHAVIOUR):
        token_ratio_exact = gradient_of(
            lambda logits, policy=policy: expectation(
                exact_kl(logits.log_softmax(1), REFERENCE.log_softmax(1))[MDP.states].flatten(), policy
            ),
            TARGET,
        )
        for estimator in ("k1", "k3"):
            got = kl_gradient(policy, True, estimator)
            torch.testing.assert_close(got, token_ratio_exact, atol=1e-13, rtol=0.0)
    # Without the weight, on-policy: k1 trains nothing, k3 another divergence, k2 is right; off-policy k2 is wrong too.
    exact = kl_gradient(TARGET, True, "k3")
    assert kl_gradient(TARGET, False, "k1").abs().max() < 1e-13
    assert (kl_gradient(TARGET, False, "k3") - exact).norm() > 0.05 * exact.norm()
    torch.testing.assert_close(kl_gradient(TARGET, False, "k2"), exact, atol=1e-13, rtol=0.0)
    off = kl_gradient(BEHAVIOUR, True, "k3")
    assert (kl_gradient(BEHAVIOUR, False, "k2") - off).norm() > 0.01 * off.norm()
