"""Sums over the sequences of a micro-batch, and from losses per token to the one number that is minimised.

A micro-batch of T tokens holds S whole sequences; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]), and what follows
the last is padding. Only tokens whose mask is not 0 are looked at, so the others may hold anything. Sums are float64
and run in the order of the tokens: a sequence's sum is the same, bit for bit, whatever it is packed with.

Aggregation cannot depend on how the batch is split. Each mode is a weighted sum, loss = sum_t weights_t L_t, over all
tokens of the *global* batch. The weights divide by counts of the whole batch, taken before its first forward pass:
`count` locally, add over micro-batches and ranks, then `aggregation_weights` for each micro-batch. Micro-batches and
ranks only ever add, nobody averages averages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def sequence_of_tokens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: the sequence of each token, S for padding.

    Args:
        cu_seqlens: [S + 1] int32.
        num_tokens: T, padding included.
    """
    ends = cu_seqlens[1:].to(torch.int64)
    # right=True: a token at an end belongs to the next sequence, and sequences without tokens are passed over.
    return torch.searchsorted(ends, torch.arange(num_tokens, device=cu_seqlens.device), right=True)


def sequence_sums(values: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum over each sequence's trained tokens: sum_t m_t values_t.

    Args:
        values: [T], any floating dtype. May carry a gradient; that of a token with mask 0 is exactly 0.
        loss_mask: [T], 1 where the token is trained on, else 0.
        cu_seqlens: [S + 1] int32.

    Returns:
        [S] float64; 0 for a sequence without trained tokens.
    """
    kept = torch.where(loss_mask != 0, values, 0.0).double() * loss_mask.double()
    # The padding is summed as one more sequence: a reduction that leaves tokens out would give them no gradient at all.
    offsets = torch.cat([cu_seqlens.to(torch.int64), torch.tensor([len(values)], device=cu_seqlens.device)])
    return torch.segment_reduce(kept, "sum", offsets=offsets, initial=0)[:-1]


def sequence_lengths(loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] float64: trained tokens of each sequence."""
    return sequence_sums(loss_mask, loss_mask.ne(0), cu_seqlens)


def sequence_means(values: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] float64: mean over each sequence's trained tokens; 0 for a sequence without any. See `sequence_sums`."""
    return sequence_sums(values, loss_mask, cu_seqlens) / sequence_lengths(loss_mask, cu_seqlens).clamp(min=1)


def to_tokens(of_sequences: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T]: each sequence's value on all its tokens, 0 on the padding.

    Args:
        of_sequences: [S], any dtype. May carry a gradient.
        cu_seqlens: [S + 1] int32.
        num_tokens: T, padding included.
    """
    return torch.cat([of_sequences, of_sequences.new_zeros(1)])[sequence_of_tokens(cu_seqlens, num_tokens)]


@dataclass(frozen=True)
class GlobalCounts:
    """What the losses of one optimizer step are divided by."""

    num_tokens: float
    """Sum of the loss mask over the global batch."""
    num_sequences: float
    """Sequences of the global batch with at least one token in the loss."""


def count(loss_mask: Tensor, cu_seqlens: Tensor) -> tuple[float, float]:
    """(num_tokens, num_sequences) of one micro-batch, to be added up to `GlobalCounts`.

    Args:
        loss_mask: [T], 1 where the token is in the loss, else 0.
        cu_seqlens: [S + 1] int32. Sequence i is [cu_seqlens[i], cu_seqlens[i + 1]); what follows the last is padding.
    """
    lengths = sequence_lengths(loss_mask, cu_seqlens)
    return float(lengths.sum()), float((lengths > 0).sum())


def aggregation_weights(
    loss_mask: Tensor, cu_seqlens: Tensor, *, mode: str, counts: GlobalCounts, token_sum_norm: float | None
) -> Tensor:
    """Weights with which one micro-batch's losses enter the loss of the global batch.

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
