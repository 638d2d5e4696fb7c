"""Cases of the policy-gradient losses, of KL, and of the critic's losses."""

import math

import torch

from megatron_rl.algorithms.aggregation import sequence_sums, to_tokens
from megatron_rl.algorithms.kl import kl_estimate, weighted_kl_estimate
from megatron_rl.algorithms.policy_loss import (
    cispo_loss,
    gspo_loss,
    gspo_token_loss,
    importance_weighted_loss,
    ppo_clip_loss,
    ppo_trajectory_loss,
    reinforce_loss,
)
from megatron_rl.algorithms.value_loss import clipped_value_loss, value_loss
from tests.unit.algorithms.loss_case import Case

PG = {"log_probs": "log_prob", "old_log_probs": "log_prob", "advantages": "real"}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
LN = math.log


def _ratio(log_probs, old_log_probs):
    return (log_probs - old_log_probs).exp()


def _mean_ratio_with_the_masked(log_probs, old_log_probs, advantages, loss_mask, cu_seqlens, **_):
    everything = torch.ones_like(loss_mask)
    lengths = cu_seqlens.diff().clamp(min=1)
    mean = sequence_sums(log_probs - old_log_probs, everything, cu_seqlens) / lengths
    return -to_tokens(mean, cu_seqlens, len(log_probs)).exp() * advantages


# Sequence 0: a masked token, ratios 1.2 and 0.9; sequence 1: ratio 1.5; sequence 2: ratio 0.5. The first's advantages
# differ between its tokens, so that what is shared in the gradient and what is not can be told apart.
SEQUENCES = {
    "log_probs": [9.0, LN(1.2) - 1, LN(0.9) - 1, LN(1.5) - 1, LN(0.5) - 1],
    "old_log_probs": [-1.0, -1.0, -1.0, -1.0, -1.0],
    "advantages": [5.0, 2.0, -1.0, 1.0, -1.0],
    "loss_mask": [0.0, 1.0, 1.0, 1.0, 1.0],
    "lengths": [3, 1, 1],
}
S = math.sqrt(1.08)  # geometric mean of 1.2 and 0.9; inside [0.8, 1.28]
R = 1.08  # their product

POLICY_CASES = [
    Case(
        "reinforce",
        reinforce_loss,
        {"log_probs": "log_prob", "advantages": "real"},
        ("log_probs",),
        # -A log p; gradient -A
        {
            "log_probs": [-2.0, -0.5, -1.0],
            "advantages": [3.0, -1.0, 0.0],
            "loss": [6.0, -0.5, 0.0],
            "d_log_probs": [-3.0, 1.0, 0.0],
        },
        {
            "sign": lambda log_probs, advantages: advantages * log_probs,
            "probability": lambda log_probs, advantages: -advantages * log_probs.exp(),
            "no advantage": lambda log_probs, advantages: -log_probs + 0 * advantages,
        },
    ),
    Case(
        "importance_weighted",
        importance_weighted_loss,
        PG,
        ("log_probs",),
        # -r A; its gradient is the same number, since dr / dlog p = r
        {
            "log_probs": [LN(1.5) - 2, LN(0.5) - 1],
            "old_log_probs": [-2.0, -1.0],
            "advantages": [2.0, -2.0],
            "loss": [-3.0, 1.0],
            "d_log_probs": [-3.0, 1.0],
        },
        {
            "log-ratio": lambda log_probs, old_log_probs, advantages: -(log_probs - old_log_probs) * advantages,
            "inverse": lambda log_probs, old_log_probs, advantages: -_ratio(old_log_probs, log_probs) * advantages,
        },
    ),
    Case(
        "ppo_clip",
        ppo_clip_loss,
        PG,
        ("log_probs",),
        # region [0.8, 1.28], dual clip 3; see the branches in test_policy_loss.py
        {
            "log_probs": [LN(1.1), LN(1.5), LN(0.5), LN(0.5), LN(5.0)],
            "old_log_probs": [0.0] * 5,
            "advantages": [2.0, 2.0, 2.0, -2.0, -2.0],
            "loss": [-2.2, -2.56, -1.0, 1.6, 6.0],
            "d_log_probs": [-2.2, 0.0, -1.0, 0.0, 0.0],
        },
        {
            "clip alone": lambda log_probs, old_log_probs, advantages, clip_low, clip_high, dual_clip: (
                -_ratio(log_probs, old_log_probs).clamp(1 - clip_low, 1 + clip_high) * advantages
            ),
            "no clip": lambda log_probs, old_log_probs, advantages, **_: -_ratio(log_probs, old_log_probs) * advantages,
            # a printed formula: grad log pi times min(r A, clip(r) A)
            "gradient of the log": lambda log_probs, old_log_probs, advantages, clip_low, clip_high, dual_clip: (
                log_probs
                * torch.maximum(
                    -_ratio(log_probs, old_log_probs) * advantages,
                    -_ratio(log_probs, old_log_probs).clamp(1 - clip_low, 1 + clip_high) * advantages,
                ).detach()
            ),
        },
        {**CLIP, "dual_clip": 3.0},
    ),
    Case(
        "cispo",
        cispo_loss,
        PG,
        ("log_probs",),
        # weights 1.1, clipped 1.28, clipped 0.8; loss -w A log p, gradient -w A
        {
            "log_probs": [LN(1.1) - 1, LN(1.5) - 1, LN(0.5) - 1],
            "old_log_probs": [-1.0, -1.0, -1.0],
            "advantages": [2.0, 2.0, -2.0],
            "loss": [-2.2 * (LN(1.1) - 1), -2.56 * (LN(1.5) - 1), 1.6 * (LN(0.5) - 1)],
            "d_log_probs": [-2.2, -2.56, 1.6],
        },
        {
            "weight with gradient": lambda log_probs, old_log_probs, advantages, clip_low, clip_high: (
                -_ratio(log_probs, old_log_probs).clamp(1 - clip_low, 1 + clip_high) * advantages * log_probs
            ),
            "ppo": lambda log_probs, old_log_probs, advantages, clip_low, clip_high: ppo_clip_loss(
                log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=None
            ),
            "one bound for both": lambda log_probs, old_log_probs, advantages, clip_low, clip_high: cispo_loss(
                log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_low
            ),
        },
        CLIP,
        stops_gradient=True,
    ),
    Case(
        "gspo",
        gspo_loss,
        PG,
        ("log_probs",),
        # Sequence 0: -s A_t, and each token's gradient sum_j -s A_j / 2 = -s (2 - 1) / 2. The others are clipped.
        {
            **SEQUENCES,
            "loss": [0.0, -2 * S, S, -1.28, 0.8],
            "d_log_probs": [0.0, -S / 2, -S / 2, 0.0, 0.0],
        },
        {"product": ppo_trajectory_loss, "own gradient": gspo_token_loss, "masked": _mean_ratio_with_the_masked},
        CLIP,
        by_sequence=True,
    ),
    Case(
        "gspo_token",
        gspo_token_loss,
        PG,
        ("log_probs",),
        # The same values, and each token's own gradient -s A_t.
        {
            **SEQUENCES,
            "loss": [0.0, -2 * S, S, -1.28, 0.8],
            "d_log_probs": [0.0, -2 * S, S, 0.0, 0.0],
        },
        {"shared gradient": gspo_loss, "product": ppo_trajectory_loss},
        CLIP,
        by_sequence=True,
        stops_gradient=True,
    ),
    Case(
        "ppo_trajectory",
        ppo_trajectory_loss,
        PG,
        ("log_probs",),
        # Sequence 0: -R A_t, and each token's gradient sum_j -R A_j = -R.
        {
            **SEQUENCES,
            "loss": [0.0, -2 * R, R, -1.28, 0.8],
            "d_log_probs": [0.0, -R, -R, 0.0, 0.0],
        },
        {"mean": gspo_loss},
        CLIP,
        by_sequence=True,
    ),
]


def _kl_case(name, loss, loss_column, gradient, mutants):
    return Case(
        name,
        loss,
        {"log_probs": "log_prob", "ref_log_probs": "log_prob"},
        ("log_probs",),
        {
            "log_probs": [LN(0.5), LN(0.25), LN(0.3)],
            "ref_log_probs": [LN(0.25), LN(0.5), LN(0.3)],
            "loss": loss_column,
            "d_log_probs": gradient,
        },
        mutants,
    )


def _weighted_case(name, estimator, loss_column, gradient):
    # weight 2, d = ln 2; weight 1/2, d = -ln 2; weight 2, d = 0
    return Case(
        name,
        lambda log_probs, old_log_probs, ref_log_probs: weighted_kl_estimate(
            log_probs, old_log_probs, ref_log_probs, estimator
        ),
        {"log_probs": "log_prob", "old_log_probs": "log_prob", "ref_log_probs": "log_prob"},
        ("log_probs",),
        {
            "log_probs": [LN(0.5), LN(0.25), LN(0.4)],
            "old_log_probs": [LN(0.25), LN(0.5), LN(0.2)],
            "ref_log_probs": [LN(0.25), LN(0.5), LN(0.4)],
            "loss": loss_column,
            "d_log_probs": gradient,
        },
        {
            "no weight": lambda log_probs, old_log_probs, ref_log_probs: kl_estimate(
                log_probs, ref_log_probs, estimator
            ),
            "weight without gradient": lambda log_probs, old_log_probs, ref_log_probs: (
                _ratio(log_probs, old_log_probs).detach() * kl_estimate(log_probs, ref_log_probs, estimator)
            ),
        },
    )


L2 = LN(2)
KL_CASES = [
    # d = ln 2, -ln 2, 0: k1 = d, gradient 1
    _kl_case(
        "k1",
        lambda log_probs, ref_log_probs: kl_estimate(log_probs, ref_log_probs, "k1"),
        [L2, -L2, 0.0],
        [1.0, 1.0, 1.0],
        {"sign": lambda log_probs, ref_log_probs: ref_log_probs - log_probs},
    ),
    # d^2 / 2, gradient d
    _kl_case(
        "k2",
        lambda log_probs, ref_log_probs: kl_estimate(log_probs, ref_log_probs, "k2"),
        [L2**2 / 2, L2**2 / 2, 0.0],
        [L2, -L2, 0.0],
        {"no half": lambda log_probs, ref_log_probs: (log_probs - ref_log_probs).square()},
    ),
    # exp(-d) - 1 + d, gradient 1 - exp(-d)
    _kl_case(
        "k3",
        lambda log_probs, ref_log_probs: kl_estimate(log_probs, ref_log_probs, "k3"),
        [L2 - 0.5, 1 - L2, 0.0],
        [0.5, -1.0, 0.0],
        {
            "inverse ratio": lambda log_probs, ref_log_probs: (
                _ratio(log_probs, ref_log_probs) - 1 - (log_probs - ref_log_probs)
            )
        },
    ),
    # w d, gradient w (d + 1)
    _weighted_case("weighted_k1", "k1", [2 * L2, -L2 / 2, 0.0], [2 * (L2 + 1), (1 - L2) / 2, 2.0]),
    # w (exp(-d) - 1 + d), gradient w d
    _weighted_case("weighted_k3", "k3", [2 * L2 - 1, (1 - L2) / 2, 0.0], [2 * L2, -L2 / 2, 0.0]),
]

VALUE_CASES = [
    Case(
        "value",
        value_loss,
        {"values": "real", "returns": "real"},
        ("values",),
        {"values": [1.0, 2.0, 0.5], "returns": [3.0, 1.0, 0.5], "loss": [2.0, 0.5, 0.0], "d_values": [-2.0, 1.0, 0.0]},
        {
            "no half": lambda values, returns: (values - returns).square(),
            "absolute": lambda values, returns: (values - returns).abs(),
        },
    ),
    Case(
        "clipped_value",
        clipped_value_loss,
        {"values": "real", "old_values": "real", "returns": "real"},
        ("values",),
        # clip 0.5 about 0: moved to its return, clipped: (0.5 - 3)^2 / 2; moved past it: 0.8^2 / 2, pulled back;
        # inside: 0.7^2 / 2; moved away: 4^2 / 2, pulled back
        {
            "values": [1.0, 1.0, 0.3, -1.0],
            "old_values": [0.0, 0.0, 0.0, 0.0],
            "returns": [3.0, 0.2, 1.0, 3.0],
            "loss": [3.125, 0.32, 0.245, 8.0],
            "d_values": [0.0, 0.8, -0.7, -4.0],
        },
        {
            "clip alone": lambda values, old_values, returns, clip: (
                (old_values + (values - old_values).clamp(-clip, clip) - returns).square() / 2
            ),
            "minimum": lambda values, old_values, returns, clip: torch.minimum(
                (values - returns).square() / 2,
                (old_values + (values - old_values).clamp(-clip, clip) - returns).square() / 2,
            ),
            "no clip": lambda values, old_values, returns, clip: (values - returns).square() / 2,
        },
        {"clip": 0.5},
    ),
]
