"""The sequences of a packed row: sums over their trained tokens, and values spread back over their tokens.

A row of T tokens holds S whole sequences; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]), and what follows the last
is padding. Only tokens whose mask is not 0 are looked at, so the others may hold anything. Sums are float64 and run in
the order of the tokens: a sequence's sum is the same, bit for bit, whatever it is packed with.
"""

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
