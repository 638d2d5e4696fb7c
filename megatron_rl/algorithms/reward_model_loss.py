"""Fitting a reward model: to preferences (Bradley-Terry), to labelled steps (process), to scores (regression).

A Bradley-Terry reward is determined up to a constant per prompt, and its scale is that of log-odds. Any monotonic
transformation of a reward ranks alike, but a policy trained on it is another one, for its probabilities are
proportional to ref exp(reward / beta): only the constant is free.
"""

import torch
from torch import Tensor
from torch.nn import functional

from megatron_rl.algorithms.metrics import Metric, masked_mean
from megatron_rl.algorithms.non_finite import finite_inputs, nan_where_not


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """Negative log-likelihood of a preference, per pair, to be minimised.

        L = -log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2

    The logarithm of a sigmoid is taken as one function: log(sigmoid(x)) is -inf below x = -104 in float32.

    Source: Bradley & Terry 1952; margin: Llama 2, arXiv:2307.09288, eq. 2; centering: Eisenstein et al. 2023,
    arXiv:2312.09244, eq. 8 (it fixes the constant that preferences leave open).

    Args:
        chosen, rejected: [P] float32, rewards of the pairs' completions; carry the gradient.
        margin: [P] float32, by how much the preferred one is better, >= 0; None: 0.
        centering: weight of the penalty on the pair's sum, >= 0.

    Returns:
        [P] in chosen's dtype; nan with gradient 0 where an input is not finite.
    """
    wanted = torch.zeros_like(chosen) if margin is None else margin.detach()
    finite, (win, lose, wanted) = finite_inputs(chosen, rejected, wanted)
    losses = -functional.logsigmoid(win - lose - wanted)
    if centering > 0:
        losses = losses + centering * (win + lose).square()
    return nan_where_not(finite, losses)


def process_reward_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of the label of each step, to be minimised.

        L_t = -(y_t log sigmoid(x_t) + (1 - y_t) log(1 - sigmoid(x_t)))

    The mask says which tokens carry a label: the last of each step.

    Source: Lightman et al. 2023, arXiv:2305.20050, section 2.4; soft labels: Math-Shepherd, arXiv:2312.08935, eq. 3.

    Args:
        logits: [T] float32. Carries the gradient, sigmoid(x_t) - y_t.
        labels: [T] float32, in [0, 1]: right or wrong, or the share of continuations that end right.

    Returns:
        [T] in logits' dtype, nats, before mask and division (`aggregation`); nan with gradient 0 where an input is not
        finite.
    """
    finite, (logits, labels) = finite_inputs(logits, labels.detach())
    losses = functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return nan_where_not(finite, losses)


def reward_regression_loss(rewards: Tensor, targets: Tensor, *, huber_delta: float | None = None) -> Tensor:
    """Squared error of a pointwise reward model, to be minimised: L = (r - y)^2 / 2.

    With a delta it is Huber's: beyond it the loss is delta (|r - y| - delta / 2), and no outlier pulls harder than
    delta.

    Source: Huber 1964, doi:10.1214/aoms/1177703732.

    Args:
        rewards: [N] float32. Carries the gradient.
        targets: [N] float32. Constant in the gradient.
        huber_delta: in units of reward, > 0; None: squared error everywhere.

    Returns:
        [N] in rewards' dtype; nan with gradient 0 where an input is not finite.
    """
    finite, (rewards, targets) = finite_inputs(rewards, targets.detach())
    error = rewards - targets
    if huber_delta is None:
        return nan_where_not(finite, error.square() / 2)
    bounded = error.clamp(-huber_delta, huber_delta)
    return nan_where_not(finite, bounded * (error - bounded / 2))


@torch.no_grad()
def process_reward_metrics(logits: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Metric]:
    """process_reward/accuracy: labelled steps (mask 1) on whose side of 1/2 the model is; all [T]."""
    agree = (logits > 0) == (labels > 0.5)
    return {"process_reward/accuracy": masked_mean(agree.double(), mask)}
