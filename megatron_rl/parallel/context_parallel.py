"""Packed rows over context-parallel ranks: which rank holds which tokens, and how their results are gathered.

Every sequence is cut into 2 * size chunks, and rank r holds chunks r and 2 * size - 1 - r: an early one, which sees few
keys, and a late one, which sees many, so that causal attention is the same work on all ranks (zig-zag; the layout of
Megatron-Core and Transformer Engine). To be cut, a sequence is padded behind its end to a multiple of 2 * size;
causality hides the padding from its tokens, and the loss never sees it. With size 2 and sequences of 6 and 3 tokens:

    row         a0 a1 a2 a3 a4 a5  b0 b1 b2
    padded row  a0 a1 a2 a3 a4 a5 . .  b0 b1 b2 .
    rank 0      a0 a1 . .  b0 .          chunks 0 and 3
    rank 1      a2 a3 a4 a5  b1 b2       chunks 1 and 2

Labels and everything else that looks at a neighbour is decided on the whole row, before it is cut. Keys and values are
gathered for attention, and log-probs for the loss, which every rank then computes for whole sequences. Logits stay.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def rank_places(cu_seqlens: Tensor, size: int, rank: int) -> Tensor:
    """[T / size] int64: the places of the padded row that a rank holds, in the order in which it holds them.

    Args:
        cu_seqlens: [S + 1], bounds of the padded sequences, each a multiple of 2 * size long, or any on one rank.
        size, rank: of the context-parallel group.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    pieces = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        chunk = (stop - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(pieces)


def gathered_order(cu_seqlens: Tensor, size: int) -> Tensor:
    """[T] int64: for each place of the padded row, where it is when the ranks' parts are joined in rank order."""
    joined = torch.cat([rank_places(cu_seqlens, size, rank) for rank in range(size)])
    order = torch.empty_like(joined)
    order[joined] = torch.arange(len(joined))
    return order


@dataclass(frozen=True)
class ContextSplit:
    """A row of T tokens over the ranks of a group, padded to P tokens."""

    cu_seqlens: Tensor
    """[S + 1] int32, bounds of the padded sequences; a last one may be padding alone."""
    max_seqlen: int
    """Length of the longest padded sequence."""
    tokens: Tensor
    """[P / size] int64: the row's token in each of this rank's slots; padding repeats a token."""
    is_padding: Tensor
    """[P / size] bool: which of this rank's slots are padding."""
    position_ids: Tensor
    """[P / size] int64: the place of each slot in its sequence."""
    restore: Tensor
    """[T] int64: where each token of the row is when the ranks' parts are joined in rank order."""

    @staticmethod
    def of(cu_seqlens: Tensor, *, size: int, rank: int, multiple: int = 1, at_least: int = 0) -> "ContextSplit":
        """The part of one rank.

        Args:
            cu_seqlens: [S + 1] bounds of the row's sequences, of any length, also 0; at least one token in all.
            size, rank: of the context-parallel group.
            multiple: a rank's part is a multiple of this long, as sequence parallelism asks for.
            at_least: a rank's part is at least this long.
        """
        bounds = cu_seqlens.tolist()
        unit = 2 * size if size > 1 else 1
        lengths = [stop - start for start, stop in pairwise(bounds)]
        padded = [-(-length // unit) * unit for length in lengths]
        missing = 0
        while (sum(padded) + missing) % (size * multiple) or sum(padded) + missing < size * at_least:
            missing += unit
        padded_bounds = list(accumulate([*padded, missing] if missing else padded, initial=0))
        source = torch.zeros(padded_bounds[-1], dtype=torch.int64)
        padding = torch.ones(padded_bounds[-1], dtype=torch.bool)
        position = torch.zeros_like(source)
        place_of_token = torch.empty(bounds[-1], dtype=torch.int64)
        for start, length, begin, end in zip(bounds, lengths, padded_bounds, padded_bounds[1:], strict=False):
            offset = torch.arange(end - begin)
            source[begin:end] = start + offset.clamp(max=length - 1)
            padding[begin:end] = offset >= length
            place_of_token[start : start + length] = begin + offset[:length]
        for begin, end in pairwise(padded_bounds):
            position[begin:end] = torch.arange(end - begin)
        whole = torch.tensor(padded_bounds, dtype=torch.int32)
        mine = rank_places(whole, size, rank)
        return ContextSplit(
            cu_seqlens=whole,
            max_seqlen=max(end - begin for begin, end in pairwise(padded_bounds)),
            tokens=source[mine],
            is_padding=padding[mine],
            position_ids=position[mine],
            restore=gathered_order(whole, size)[place_of_token],
        )


def gather_keys(values: Tensor, group: ProcessGroup) -> Tensor:
    """[T, ...] of every rank -> [size * T, ...], in rank order; each rank uses them in its own way.

    Backward: what all ranks made of a part is summed on the rank that owns it.
    """
    out: Tensor = _Gather.apply(values, group, True)
    return out


def gather_outputs(values: Tensor, group: ProcessGroup) -> Tensor:
    """[T, ...] of every rank -> [size * T, ...], in rank order; all ranks compute the same from them.

    Backward: each rank takes its own part. The gradients that the ranks have are equal; a sum would count them twice.
    """
    out: Tensor = _Gather.apply(values, group, False)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup, sums: bool) -> Tensor:
        ctx.group, ctx.sums = group, sums
        out = values.new_empty(group.size() * values.shape[0], *values.shape[1:])
        dist.all_gather_into_tensor(out, values.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        size, rank = ctx.group.size(), ctx.group.rank()
        part = len(grad) // size
        if not ctx.sums:
            return grad[rank * part : (rank + 1) * part], None, None
        out = grad.new_empty(part, *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None, None
