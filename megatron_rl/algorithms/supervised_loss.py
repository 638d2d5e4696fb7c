"""Supervised fine-tuning: the negative log-likelihood of the target tokens, smoothed, or focused on the hard ones.

The penalty for leaving a reference is `kl.exact_kl` (or its vocabulary-parallel form): the tokens of a data set are no
samples of the policy, so the estimators k1 to k3 do not estimate KL(policy || reference) on them.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.non_finite import finite_inputs, nan_where_not


def sft_loss(log_probs: Tensor) -> Tensor:
    """Per-token negative log-likelihood, to be minimised: L_t = -log_probs_t.

    Args:
        log_probs: [T] float32, nats. Of the target tokens; carries the gradient.

    Returns:
        [T] in log_probs' dtype, nats. Masked and divided by the caller; see `aggregation`.
    """
    return -log_probs


def label_smoothed_loss(log_probs: Tensor, mean_log_probs: Tensor, *, smoothing: float) -> Tensor:
    """Cross entropy to a target that has `smoothing` spread evenly over the vocabulary, per token, to be minimised.

        L_t = -(1 - eps) log p_t(target) - eps / V sum_v log p_t(v)

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7.

    Args:
        log_probs: [T] float32, nats. Of the target tokens; carries the gradient.
        mean_log_probs: [T] float32, nats. Mean over the vocabulary of each position's log-probs; carries the gradient.
        smoothing: eps, in [0, 1).

    Returns:
        [T] in log_probs' dtype, nats; nan with gradient 0 where an input is not finite.
    """
    finite, (target, mean) = finite_inputs(log_probs, mean_log_probs)
    return nan_where_not(finite, -(1 - smoothing) * target - smoothing * mean)


def focal_loss(log_probs: Tensor, *, gamma: float, alpha: float = 1.0) -> Tensor:
    """Negative log-likelihood that turns from what is known to what is not, per token, to be minimised.

        L_t = -alpha (1 - p_t)^gamma log p_t

    gamma 0 is `sft_loss`. The paper's alpha_t is a weight per class; a vocabulary has no two classes, so here it is one
    number.

    Source: Lin et al. 2017, arXiv:1708.02002, eq. 5.

    Args:
        log_probs: [T] float32, nats, <= 0. Of the target tokens; carries the gradient.
        gamma: focus, >= 0.
        alpha: weight.

    Returns:
        [T] in log_probs' dtype, nats; nan with gradient 0 where an input is not finite.
    """
    finite, (log_probs,) = finite_inputs(log_probs)
    if gamma == 0:
        return nan_where_not(finite, -alpha * log_probs)
    # 1 - p by expm1 keeps its digits near p = 1. At p = 1 itself the derivative of a power below 1 would be infinite.
    missing = (-torch.expm1(log_probs.clamp(max=0))).clamp(min=torch.finfo(log_probs.dtype).tiny)
    return nan_where_not(finite, -alpha * missing.pow(gamma) * log_probs)
