"""Fitting a critic to returns, how well it fits, and the sum of an actor-critic loss with each of its terms.

The factor 1/2 is a convention (the gradient is then V - R); the loss is printed with it and without, which is a
factor of two in the value coefficient. GRPO is at times printed with a value loss: it has no critic, its baseline is
the group's mean. The term is an option only where a critic is configured.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import weighted_sum
from megatron_rl.algorithms.metrics import ExplainedVariance, Metric, Moments, masked_mean
from megatron_rl.algorithms.non_finite import finite_inputs, nan_where_not


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Per-token squared error of the critic, to be minimised: L_t = (V_t - R_t)^2 / 2.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 9 (without the 1/2).

    Args:
        values: [T] float32. Carries the gradient, V_t - R_t.
        returns: [T] float32. Constant in the gradient.

    Returns:
        [T] in values' dtype, before mask and division (`aggregation`); nan with gradient 0 where an input is not
        finite.
    """
    finite, (value, target) = finite_inputs(values, returns.detach())
    return nan_where_not(finite, (value - target).square() / 2)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Squared error that stops pulling a value once it moved `clip` away from the old one, towards its return.

        L_t = max((V_t - R_t)^2, (V'_t - R_t)^2) / 2,     V'_t = clip(V_t, old_t - clip, old_t + clip)

    The maximum, not V' alone: a value that moved away from its return is still pulled back.

    Source: the PPO reference implementation (openai/baselines, ppo2/model.py); it is not in the paper.

    Args:
        values: [T] float32. Carries the gradient.
        old_values: [T] float32. Of the critic before the step's first update; constant in the gradient.
        returns: [T] float32. Constant in the gradient.
        clip: half-width, > 0, in units of return.

    Returns:
        [T] as `value_loss`.
    """
    finite, (value, old, target) = finite_inputs(values, old_values.detach(), returns.detach())
    clipped = torch.minimum(torch.maximum(value, old - clip), old + clip)
    return nan_where_not(finite, torch.maximum((value - target).square(), (clipped - target).square()) / 2)


@torch.no_grad()
def value_metrics(
    values: Tensor, returns: Tensor, mask: Tensor, *, old_values: Tensor | None = None, clip: float | None = None
) -> dict[str, Metric]:
    """How well values predict returns.

    Args:
        values, returns, old_values, clip: as in `clipped_value_loss`; old_values and clip together, or neither.
        mask: [T], 1 for the tokens that count; masked tokens may hold anything.

    Returns:
        value/mean, value/return_mean, value/explained_variance (see `metrics.ExplainedVariance`), and, with a clip,
        value/clip_fraction: tokens whose gradient the clip makes 0.
    """
    found: dict[str, Metric] = {
        "value/mean": masked_mean(values, mask),
        "value/return_mean": masked_mean(returns, mask),
        "value/explained_variance": ExplainedVariance(
            returns=Moments.of(returns, mask), residuals=Moments.of(returns.double() - values.double(), mask)
        ),
    }
    if old_values is not None and clip is not None:
        moved = (values - old_values).abs() > clip
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        silenced = moved & ((clipped - returns).square() > (values - returns).square())
        found["value/clip_fraction"] = masked_mean(silenced.double(), mask)
    return found


def combined_loss(
    policy: Tensor,
    weights: Tensor,
    *,
    values: tuple[Tensor, float] | None = None,
    entropy: tuple[Tensor, float] | None = None,
    kl: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = policy + c_v value loss - c_e entropy + c_k KL, over one micro-batch's share of the global batch.

    The entropy is *subtracted*: a bonus, as in PPO (arXiv:1707.06347, eq. 9). Where
    -sum pi log pi is printed as an "entropy loss" that is added with a positive coefficient, exploration is punished.
    And where GRPO is printed with a value term: it has no critic, so it has none, unless one is configured.

    Args:
        policy: [T]. Per-token policy loss; carries the gradient.
        weights: [T], of `aggregation.aggregation_weights`, for all terms.
        values: per-token value loss [T] (`value_loss`), and c_v.
        entropy: per-token entropy [T], nats, and c_e.
        kl: per-token KL [T] (`kl`), nats, and c_k.

    Returns:
        The loss, a scalar, and its terms as they enter it, sign and coefficient included, without gradient: names of
        {'policy', 'value', 'entropy', 'kl'}. The terms add up to the loss.
    """
    terms = {"policy": weighted_sum(policy, weights)}
    for name, term, sign in (("value", values, 1.0), ("entropy", entropy, -1.0), ("kl", kl, 1.0)):
        if term is not None:
            per_token, coefficient = term
            terms[name] = sign * coefficient * weighted_sum(per_token, weights)
    return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}
