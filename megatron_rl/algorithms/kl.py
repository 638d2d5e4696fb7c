"""Estimators of KL(policy || reference) from tokens that the policy sampled.

With x ~ policy and d = log_probs - ref_log_probs (Schulman, joschu.net/blog/kl-approx.html):

    k1 = d                    k2 = d^2 / 2                    k3 = exp(-d) - 1 + d

Which of them is right depends on what is used, the value or the gradient. An estimator inside the loss is
differentiated with the samples held fixed, and E[grad k] is not grad E[k] (arXiv:2506.09477):

    |    | E[value]      | E[gradient], samples from the policy                         |
    | k1 | KL, unbiased  | 0: it trains nothing                                         |
    | k2 | biased        | grad KL(policy || reference): the right one for the loss     |
    | k3 | KL, unbiased  | grad KL(reference || policy): the forward KL, near d = 0 the same |

So k1 belongs in the reward, k2 in the loss, and k3 is the one to report: unbiased and never negative. All of this holds
for samples of `log_probs`' own policy; samples of an older policy need an importance weight in front.

The exponent's sign matters: exp(d) - 1 - d under samples of the policy does not estimate this KL.
"""

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Upper bound, nats, of a log-ratio before exp. exp(20) = 4.9e8: above any ratio of two policies that a run survives,
yet its square and sums of it over a batch stay finite in float32 (which overflows at exp(88.7)). Below the bound value
and gradient are untouched; above, the value is constant and the gradient 0. No lower bound: exp underflows to 0."""


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy || reference); formulas and what they are good for: this module's docstring.

    Computed in float64: k3 and its gradient are differences of nearly equal numbers where the policies nearly agree.

    Args:
        log_probs: [T] float32, nats. The policy that sampled the tokens; carries the gradient.
        ref_log_probs: [T] float32, nats. Constant in the gradient.
        estimator: 'k1', 'k2' or 'k3'.

    Returns:
        [T] in log_probs' dtype, nats (k2, k3: >= 0). Where an input is nan or infinite the value is nan and the
        gradient 0: a masked token cannot reach the parameters, an unmasked one cannot pass unseen.

    Raises:
        ValueError: unknown estimator.
    """
    difference = log_probs.double() - ref_log_probs.detach().double()
    finite = torch.isfinite(difference)
    difference = torch.where(finite, difference, 0.0)
    if estimator == "k1":
        values = difference
    elif estimator == "k2":
        values = difference.square() / 2
    elif estimator == "k3":
        log_ratio = (-difference).clamp(max=MAX_LOG_RATIO)
        values = torch.expm1(log_ratio) - log_ratio
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}; one of 'k1', 'k2', 'k3'")
    return torch.where(finite, values, torch.nan).to(log_probs.dtype)
