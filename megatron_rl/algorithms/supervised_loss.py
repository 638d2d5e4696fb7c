"""Supervised fine-tuning: the negative log-likelihood of the target tokens."""

from torch import Tensor


def sft_loss(log_probs: Tensor) -> Tensor:
    """Per-token negative log-likelihood, to be minimised: L_t = -log_probs_t.

    Args:
        log_probs: [T] float32, nats. Of the target tokens; carries the gradient.

    Returns:
        [T] in log_probs' dtype, nats. Masked and divided by the caller; see `aggregation`.
    """
    return -log_probs
