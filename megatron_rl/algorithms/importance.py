"""Importance weights between two policies that should be one: the engine's that sampled, and the trainer's.

Tokens of a policy mu train a policy pi. E_mu[w f] = E_pi[f] for w = pi(completion) / mu(completion); everything else
here gives up some of that for less variance:

    level       ratio of a token's weight                            unbiased for
    token       pi(y_t) / mu(y_t)                                    the token, given its prefix is pi's own
    sequence    product over the completion's tokens                 the completion; its variance grows with length
    geometric   product^(1 / tokens): one number, free of length     nothing, but comparable between lengths

    method      w, from the ratio rho and the bounds [low, high]
    truncate    min(rho, high)                 bounded, keeps every token; low is not used
    mask        rho inside the bounds, else 0  leaves out tokens (completions) that disagree      IcePop
    reject      1 inside the bounds, else 0    leaves them out and weighs the others alike

A bound is a bound of the ratio itself: 1.5 is outside [0.6, 1.4], and |rho - 1| <= eps is not the same test for other
bounds. Weights are constants in the gradient. Tokens that are left out still count in the loss's divisor: the batch is
what was sampled.

Sources: truncation: Espeholt et al. 2018, arXiv:1802.01561, and Yao et al. 2025 ("Your efficient RL framework secretly
brings you off-policy RL training"); masking: IcePop, Ling team 2025, arXiv:2510.18855; sequence level:
arXiv:2507.18071.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import sequence_means, sequence_sums, to_tokens
from megatron_rl.algorithms.kl import MAX_LOG_RATIO
from megatron_rl.algorithms.metrics import EffectiveSampleSize, Metric, masked_max, masked_mean, masked_min
from megatron_rl.algorithms.non_finite import finite_inputs, nan_where_not

Level = Literal["token", "sequence", "geometric"]
Method = Literal["truncate", "mask", "reject"]


def log_ratios(
    log_probs: Tensor, behaviour_log_probs: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, *, level: Level
) -> Tensor:
    """Per-token log of the importance ratio at a level; see this module's docstring.

    Sums over a sequence are float64 and see all of it: under context parallelism gather the micro-batch first.

    Args:
        log_probs: [T] float32, nats. Of the policy that is trained; may carry a gradient.
        behaviour_log_probs: [T] float32, nats. Of the policy that sampled; constant in the gradient.
        loss_mask: [T], 1 for sampled tokens, else 0; masked tokens may hold anything.
        cu_seqlens: [S + 1] int32.
        level: 'token', 'sequence' or 'geometric'.

    Returns:
        [T] in log_probs' dtype, nats; a sequence's on all its tokens. 0 on masked tokens at token level. nan, with
        gradient 0, where (a trained token of the sequence) is not finite.

    Raises:
        ValueError: unknown level.
    """
    difference = torch.where(loss_mask != 0, log_probs - behaviour_log_probs.detach(), 0.0)
    finite, (difference,) = finite_inputs(difference)
    if level == "token":
        return nan_where_not(finite, difference)
    if level not in ("sequence", "geometric"):
        raise ValueError(f"unknown level {level!r}; one of 'token', 'sequence', 'geometric'")
    reduce = sequence_sums if level == "sequence" else sequence_means
    whole = sequence_sums((~finite).double(), loss_mask, cu_seqlens) == 0
    of_sequences = nan_where_not(whole, reduce(torch.where(finite, difference, 0.0), loss_mask, cu_seqlens))
    return to_tokens(of_sequences, cu_seqlens, len(log_probs)).to(log_probs.dtype)


@torch.no_grad()
def correction_weights(log_ratio: Tensor, *, method: Method, low: float, high: float) -> Tensor:
    """Weights with which tokens enter a loss, from the log of their ratio; see this module's docstring.

    Args:
        log_ratio: [T], nats; of `log_ratios` at any level. It may not be finite on masked tokens.
        method: 'truncate', 'mask' or 'reject'.
        low, high: bounds of the ratio, dimensionless, 0 <= low < high; both belong to the inside.

    Returns:
        [T] in log_ratio's dtype; nan where log_ratio is not finite.

    Raises:
        ValueError: unknown method, or bounds in the wrong order.
    """
    if not 0 <= low < high:
        raise ValueError(f"bounds are [{low}, {high}]; must be 0 <= low < high")
    finite, (log_ratio,) = finite_inputs(log_ratio)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    inside = (ratio >= low) & (ratio <= high)
    if method == "truncate":
        weights = ratio.clamp(max=high)
    elif method == "mask":
        weights = torch.where(inside, ratio, 0.0)
    elif method == "reject":
        weights = inside.to(ratio.dtype)
    else:
        raise ValueError(f"unknown method {method!r}; one of 'truncate', 'mask', 'reject'")
    return nan_where_not(finite, weights)


@torch.no_grad()
def importance_metrics(log_ratio: Tensor, mask: Tensor, *, low: float, high: float) -> dict[str, Metric]:
    """What the ratios look like, corrected or not: the metrics of the metrics-only mode.

    Args:
        log_ratio: [T], nats; of `log_ratios`.
        mask: [T], 1 for the tokens that count, else 0.
        low, high: bounds of the ratio, as in `correction_weights`.

    Returns:
        importance/ratio_mean: 1 in expectation where the ratio is unbiased, per token (or per completion).
        importance/ratio_min, importance/ratio_max: extremes; the maximum shows at most exp(`kl.MAX_LOG_RATIO`).
        importance/below_fraction, importance/above_fraction: tokens outside the bounds, on either side.
        importance/effective_sample_size: part of the tokens that carries the estimate, in (0, 1].
    """
    ratio = log_ratio.double().clamp(max=MAX_LOG_RATIO).exp()
    kept = torch.where(mask != 0, ratio, 0.0)
    return {
        "importance/ratio_mean": masked_mean(ratio, mask),
        "importance/ratio_min": masked_min(ratio, mask),
        "importance/ratio_max": masked_max(ratio, mask),
        "importance/below_fraction": masked_mean((ratio < low).double(), mask),
        "importance/above_fraction": masked_mean((ratio > high).double(), mask),
        "importance/effective_sample_size": EffectiveSampleSize(
            value=(kept * mask).sum(),
            count=mask.double().sum(),
            sum_of_squares=(kept.square() * mask).sum(),
        ),
    }
