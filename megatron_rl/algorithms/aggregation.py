"""From per-token losses to the one number that is minimised, so that no split of the batch can change it.

Each mode is a weighted sum, loss = sum_t weights_t L_t, over all tokens of the *global* batch. The weights divide by
counts of the whole batch, taken before its first forward pass: `count` locally, add over micro-batches and ranks, then
`aggregation_weights` for each packed row. Micro-batches and ranks only ever add, nobody averages averages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.algorithms.sequences import sequence_lengths, sequence_of_tokens


@dataclass(frozen=True)
class GlobalCounts:
    """What the losses of one optimizer step are divided by."""

    num_tokens: float
    """Sum of the loss mask over the global batch."""
    num_sequences: float
    """Sequences of the global batch with at least one token in the loss."""


def count(loss_mask: Tensor, cu_seqlens: Tensor) -> tuple[float, float]:
    """(num_tokens, num_sequences) of one packed row, to be added up to `GlobalCounts`.

    Args:
        loss_mask: [T], 1 where the token is in the loss, else 0.
        cu_seqlens: [S + 1] int32. Sequence i is [cu_seqlens[i], cu_seqlens[i + 1]); what follows the last is padding.
    """
    lengths = sequence_lengths(loss_mask, cu_seqlens)
    return float(lengths.sum()), float((lengths > 0).sum())


def aggregation_weights(
    loss_mask: Tensor, cu_seqlens: Tensor, *, mode: str, counts: GlobalCounts, token_sum_norm: float | None
) -> Tensor:
    """Weights with which one packed row's losses enter the loss of the global batch.

        token_mean                 m_t / num_tokens                                        DAPO, arXiv:2503.14476
        sequence_mean_token_mean   m_t / (len_i num_sequences), len_i = sum of i's mask    GRPO, arXiv:2402.03300
        sequence_mean_token_sum    m_t / num_sequences                                     PPO's sum over an episode
        token_sum_norm             m_t / (num_sequences token_sum_norm)                    Dr.GRPO, arXiv:2503.20783

    A sequence without a token in the loss is no sequence: it has weight 0 and is not counted.

    Args:
        loss_mask: [T], 1 where the token is in the loss, else 0.
        cu_seqlens: [S + 1] int32. Sequence i is [cu_seqlens[i], cu_seqlens[i + 1]); what follows the last is padding.
        mode: one of the four names above.
        counts: of the global batch.
        token_sum_norm: constant length of a sequence, tokens, for the mode of that name.

    Returns:
        [T] float32, 0 where the mask is.

    Raises:
        ValueError: unknown mode, or mode 'token_sum_norm' without a positive token_sum_norm.
    """
    lengths = sequence_lengths(loss_mask, cu_seqlens)
    sequence = sequence_of_tokens(cu_seqlens, len(loss_mask))
    divisor: Tensor | float
    if mode == "token_mean":
        divisor = counts.num_tokens
    elif mode == "sequence_mean_token_mean":
        divisor = torch.cat([lengths, lengths.new_zeros(1)])[sequence] * counts.num_sequences
    elif mode == "sequence_mean_token_sum":
        divisor = counts.num_sequences
    elif mode == "token_sum_norm":
        if token_sum_norm is None or token_sum_norm <= 0:
            raise ValueError(f"aggregation 'token_sum_norm' needs token_sum_norm > 0, got {token_sum_norm}")
        divisor = counts.num_sequences * token_sum_norm
    else:
        raise ValueError(
            f"unknown aggregation {mode!r}; one of 'token_mean', 'sequence_mean_token_mean', "
            "'sequence_mean_token_sum', 'token_sum_norm'"
        )
    mask = loss_mask.double()
    in_loss = (mask != 0) & (sequence < len(lengths))
    return torch.where(in_loss, mask / divisor, 0.0).float()


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """weights_t losses_t, where a token of weight 0 may hold anything, also nan, and gets gradient exactly 0.

    Args:
        losses: [T]. Carries the gradient.
        weights: [T], of `aggregation_weights`. Constant in the gradient.

    Returns:
        [T] of the losses' dtype.
    """
    weights = weights.detach().to(losses.dtype)
    return torch.where(weights != 0, losses, 0.0) * weights


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """sum_t weights_t losses_t, a scalar; see `weighted`."""
    return weighted(losses, weights).sum()
