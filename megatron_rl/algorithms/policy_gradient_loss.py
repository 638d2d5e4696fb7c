"""Policy-gradient losses without a trust region: REINFORCE, its importance-weighted form, and CISPO.

REINFORCE, REINFORCE with a baseline, RLOO, REINFORCE++ and A2C are one loss; they differ in what the advantages are
(`advantages`, `gae`). A gradient is right at one point, the policy that sampled: these losses are for one update per
batch, or need the importance weight.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import MAX_LOG_RATIO
from megatron_rl.algorithms.metrics import Metric, masked_max, masked_mean, masked_min
from megatron_rl.algorithms.non_finite import finite_inputs, nan_where_not


def reinforce_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Per-token REINFORCE, to be minimised: L_t = -A_t log_probs_t. Its value means nothing; its gradient does.

    Source: Williams 1992, doi:10.1007/BF00992696; as the actor of A2C: Mnih et al. 2016, arXiv:1602.01783.

    Args:
        log_probs: [T] float32, nats. Of the policy that sampled; carries the gradient, -A_t.
        advantages: [T] float32. Constant in the gradient.

    Returns:
        [T] in log_probs' dtype, before mask and division (`aggregation`); nan with gradient 0 where an input is not
        finite.
    """
    finite, (log_probs, advantages) = finite_inputs(log_probs, advantages.detach())
    return nan_where_not(finite, -advantages * log_probs)


def importance_weighted_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Per-token surrogate without a clip, to be minimised: L_t = -r_t A_t, r_t = exp(log_probs_t - old_log_probs_t).

    Under samples of the old policy its gradient is unbiased for actions, given their states; over a whole completion
    the product of the ratios would be needed. At r = 1 it is REINFORCE, bit for bit in the gradient. Nothing bounds it.

    Source: Schulman et al. 2015, arXiv:1502.05477, eq. 14 (the objective of TRPO, without its constraint).

    Args:
        log_probs: [T] float32, nats. Carries the gradient, -r_t A_t.
        old_log_probs: [T] float32, nats. Of the policy that sampled; constant in the gradient.
        advantages: [T] float32. Constant in the gradient.

    Returns:
        [T] as `reinforce_loss`. The log-ratio is bounded above by `kl.MAX_LOG_RATIO`.
    """
    finite, (log_ratio, advantages) = finite_inputs(log_probs - old_log_probs.detach(), advantages.detach())
    return nan_where_not(finite, -log_ratio.clamp(max=MAX_LOG_RATIO).exp() * advantages)


def cispo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Per-token CISPO, to be minimised: the importance *weight* is clipped, and no token loses its gradient.

        L_t = -sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t log_probs_t,   r_t = exp(log_probs_t - old_log_probs_t)

    PPO's clip silences rare tokens that a first update made likely, often those that turn a chain of thought ("wait");
    here they go on learning with the bounded weight. MiniMax uses no lower bound: clip_low 1 is that.

    Source: MiniMax-M1, arXiv:2506.13585, eq. 4 and 5.

    Args:
        log_probs: [T] float32, nats. Carries the gradient, -clip(r_t) A_t.
        old_log_probs: [T] float32, nats. Constant in the gradient.
        advantages: [T] float32. Constant in the gradient.
        clip_low, clip_high: bounds of the weight around 1, dimensionless, >= 0.

    Returns:
        [T] as `reinforce_loss`.
    """
    finite, (log_probs, log_ratio, advantages) = finite_inputs(
        log_probs, (log_probs - old_log_probs).detach(), advantages.detach()
    )
    weights = log_ratio.clamp(max=MAX_LOG_RATIO).exp().clamp(1 - clip_low, 1 + clip_high)
    return nan_where_not(finite, -weights * advantages * log_probs)


@torch.no_grad()
def cispo_metrics(
    log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> dict[str, Metric]:
    """How many weights the clip bounds; unlike in PPO, their tokens still learn.

    Returns:
        policy/clip_fraction, its parts _low and _high, and policy/ratio_min and _max, as in `ppo_clip_metrics`.
    """
    ratio = (log_probs.double() - old_log_probs.double()).clamp(max=MAX_LOG_RATIO).exp()
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return {
        "policy/ratio_max": masked_max(ratio, mask),
        "policy/ratio_min": masked_min(ratio, mask),
        "policy/clip_fraction": masked_mean((low | high).double(), mask),
        "policy/clip_fraction_low": masked_mean(low.double(), mask),
        "policy/clip_fraction_high": masked_mean(high.double(), mask),
    }
