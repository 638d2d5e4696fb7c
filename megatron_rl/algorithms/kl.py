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
for samples of `log_probs`' own policy; samples of an older policy need an importance weight in front. With that weight,
differentiated too, k1 and k3 are right in value and in gradient (`weighted_kl_estimate`), on-policy and off.

The exponent's sign matters: exp(d) - 1 - d under samples of the policy does not estimate this KL. It is often printed
so, as (r - 1) - log r with r = policy / reference: for d = 0.1, -0.5, 0.1, 1.2 that sums to 1.237, the right one to
0.660, and k1 to 0.9 (the 0.657 that stands beside this example follows neither). In the same way E_old[log old/new],
and E_old[r - 1 - log r] with r = new / old, are the KL of (old || new), not of (new || old).

An estimate per token, summed over a completion, is of the KL of completions only in expectation over the policy's own
prefixes, and never so for the tokens of a data set: there take `exact_kl`.
"""

import math
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


def weighted_kl_estimate(
    log_probs: Tensor, old_log_probs: Tensor, ref_log_probs: Tensor, estimator: Literal["k1", "k2", "k3"]
) -> Tensor:
    """Per-token estimate whose gradient, too, is right: the importance weight times k, both differentiated.

        w_t k_t,   w_t = exp(log_probs_t - old_log_probs_t),   d/d log_probs_t = w_t (k_t + k'_t)

    For k1 and k3, E_old[w k] = KL(policy || reference) whatever the policy is, so the gradient of the one is that of
    the other: w (d + 1) per token for k1, w d for k3, which are equal in expectation. k3 is the better: never negative,
    and zero in value and gradient where the policies agree. On-policy (old_log_probs = log_probs) the weight is 1 in
    value and still gives the gradient; `kl_estimate` alone then lacks the part w k.

    Source: DeepSeek-V3.2, arXiv:2512.02556, section 3.1 (with k3); derivation above.

    Args:
        log_probs: [T] float32, nats. Carries the gradient.
        old_log_probs: [T] float32, nats. Of the policy that sampled the tokens; constant in the gradient.
        ref_log_probs: [T] float32, nats. Constant in the gradient.
        estimator: 'k1' or 'k3'; 'k2' is allowed, and is biased.

    Returns:
        [T] as `kl_estimate`. Both exponents are bounded above by MAX_LOG_RATIO.
    """
    log_ratio = log_probs - old_log_probs.detach()
    kl = kl_estimate(log_probs, ref_log_probs, estimator)
    finite = torch.isfinite(log_ratio) & torch.isfinite(kl.detach())
    weight = torch.where(finite, log_ratio, 0.0).clamp(max=MAX_LOG_RATIO).exp()
    return torch.where(finite, weight * torch.where(finite, kl, 0.0), torch.nan)


def exact_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of whole distributions, sum_v p_v (log p_v - log q_v), for vocabularies that fit on one rank.

    The one place where KL of the tokens of a data set (as a penalty in supervised fine-tuning) is what it says: those
    tokens are no samples of the policy. For a vocabulary that is sharded over ranks see `parallel`.

    Args:
        log_p, log_q: [..., V] nats, normalised; -inf is probability 0. Either may carry a gradient; detach a reference.

    Returns:
        [...] in log_p's dtype, nats; inf where p has mass that q has not, nan where an input is
        nan, both with gradient 0.
    """
    dtype = log_p.dtype
    log_p, log_q = log_p.double(), log_q.double()
    impossible = log_p == -torch.inf
    bad = ~(impossible | torch.isfinite(log_p - log_q)).all(-1)
    skipped = impossible | bad[..., None]
    kept_p, kept_q = torch.where(skipped, 0.0, log_p), torch.where(skipped, 0.0, log_q)
    kl = torch.where(skipped, 0.0, kept_p.exp() * (kept_p - kept_q)).sum(-1)
    unseen = torch.where((log_p.isnan() | log_q.isnan()).any(-1), torch.nan, torch.inf).to(kl.dtype)
    return torch.where(bad, unseen, kl).to(dtype)


def adaptive_kl_coefficient(coefficient: float, kl: float, *, target: float, horizon: float, num_samples: int) -> float:
    """The KL coefficient of the next step: raised where the KL is above its target, lowered below, 20 % at most.

        e = clip(kl / target - 1, -0.2, 0.2),     beta <- beta (1 + e num_samples / horizon)

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.

    Args:
        coefficient: of this step, >= 0.
        kl: measured in this step over the global batch, nats.
        target: nats, > 0; as `kl`, of a completion or of a token.
        horizon: samples over which the coefficient can change by a factor of about e^0.2, >= num_samples.
        num_samples: completions of this step.

    Returns:
        The new coefficient; unchanged where kl is not finite.

    Raises:
        ValueError: target or horizon that make no sense.
    """
    if target <= 0 or horizon < num_samples:
        raise ValueError(f"target is {target}, must be > 0; horizon is {horizon}, must be >= {num_samples} samples")
    if not math.isfinite(kl):
        return coefficient
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_samples / horizon)
