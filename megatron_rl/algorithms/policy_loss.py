"""The clipped surrogate of PPO, with separate bounds and the dual clip, and what to watch while it trains.

What the clip does not do. It does not bound the ratio: outside the region the gradient of a token is 0, but its step
overshoots, other tokens' gradients move it on, and nothing pulls it back (tests/theory). Nor is the gradient 0 outside
the region on both sides: it is so only where the advantage pushes outwards. Where it is not clipped the gradient is
r A grad log pi, and where it is clipped 0, never min(r A, clip(r) A) grad log pi, as it is printed at times. It is a
biased estimate then, and no guarantee of monotonic improvement is left.

"Dual clip" is the third bound below, not the two sides of the ordinary clip.

`ppo_clip_loss` is what is differentiated; `ppo_clip_metrics` describes the same tokens without a gradient. Both work on
per-token log-ratios; masks and the division belong to `aggregation`.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from megatron_rl.algorithms.metrics import Metric, masked_max, masked_mean, masked_min


def ppo_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    """Per-token clipped surrogate of PPO, to be minimised.

        L_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),   r_t = exp(log_probs_t - old_log_probs_t)
        L_t = min(L_t, -dual_clip A_t)   where A_t < 0, if dual_clip is given

    The minimum leaves a bad token (A_t < 0) that became far more probable with a loss and a gradient without bound; the
    dual clip bounds the loss by dual_clip |A_t|. The log-ratio is bounded above by `kl.MAX_LOG_RATIO` (20 nats), which
    changes neither value nor gradient below it.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; separate bounds: DAPO, arXiv:2503.14476; dual clip: Ye et
    al. 2019, arXiv:1912.09729.

    Args:
        log_probs: [T] float32, nats. Current policy; carries the gradient.
        old_log_probs: [T] float32, nats. Policy on which the trust region is centred; constant in the gradient.
        advantages: [T] float32. Constant in the gradient.
        clip_low, clip_high: half-widths of the trust region of the ratio, dimensionless.
        dual_clip: bound of the loss in units of |A_t|, > 1; None: no bound.

    Returns:
        [T] in log_probs' dtype, before mask and division (`aggregation`). Where an input is nan or infinite the value
        is nan and the gradient 0: a masked token cannot reach the parameters, an unmasked one cannot pass unseen.

    Raises:
        ValueError: dual_clip <= 1, which would silence bad tokens inside the trust region.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}; must be greater than 1, or null for none")
    log_ratio = log_probs - old_log_probs.detach()
    advantages = advantages.detach()
    finite = torch.isfinite(log_ratio) & torch.isfinite(advantages)
    # This `where` gives the log-ratio a gradient of 0 where the products below would make it 0 * nan.
    ratio = torch.where(finite, log_ratio, 0.0).clamp(max=MAX_LOG_RATIO).exp()
    losses = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return torch.where(finite, losses, torch.nan)


@torch.no_grad()
def ppo_clip_metrics(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> dict[str, Metric]:
    """How far the policy moved from old_log_probs' policy, and how many tokens the clip silenced; float64.

    Args:
        log_probs, old_log_probs, advantages, clip_low, clip_high, dual_clip: as in `ppo_clip_loss`.
        mask: [T], 1 for the tokens that count, else 0; masked tokens may hold anything.

    Returns:
        policy/approx_kl: mean k3 estimate of KL(old || new), nats; exactly 0 where the policies are equal.
        policy/ratio_max, policy/ratio_min: extremes of new / old; the maximum shows at most exp(`kl.MAX_LOG_RATIO`).
        policy/clip_fraction: tokens whose gradient the clip makes 0. It is the sum of its disjoint parts _low (A < 0,
            ratio below the region), _high (A > 0, ratio above it) and _dual (A < 0, ratio above dual_clip).
    """
    new, old = log_probs.double(), old_log_probs.double()
    ratio = (new - old).clamp(max=MAX_LOG_RATIO).exp()
    low = (advantages < 0) & (ratio < 1 - clip_low)
    high = (advantages > 0) & (ratio > 1 + clip_high)
    dual = (advantages < 0) & (ratio > (torch.inf if dual_clip is None else dual_clip))
    # The tokens were sampled by the old policy, so it takes the place of `log_probs`. Rounding may leave k3 at -1e-17.
    approx_kl = kl_estimate(old, new, "k3").clamp(min=0)
    return {
        "policy/approx_kl": masked_mean(approx_kl, mask),
        "policy/ratio_max": masked_max(ratio, mask),
        "policy/ratio_min": masked_min(ratio, mask),
        "policy/clip_fraction": masked_mean((low | high | dual).double(), mask),
        "policy/clip_fraction_low": masked_mean(low.double(), mask),
        "policy/clip_fraction_high": masked_mean(high.double(), mask),
        "policy/clip_fraction_dual": masked_mean(dual.double(), mask),
    }
