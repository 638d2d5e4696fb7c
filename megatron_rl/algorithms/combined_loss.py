"""The terms of an actor-critic loss, added up, and each by itself: the decomposition that the report shows."""

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import weighted_sum


def combined_loss(
    policy: Tensor,
    weights: Tensor,
    *,
    values: tuple[Tensor, float] | None = None,
    entropy: tuple[Tensor, float] | None = None,
    kl: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = policy + c_v value loss - c_e entropy + c_k KL, over one packed row's share of the global batch.

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
