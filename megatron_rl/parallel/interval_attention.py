"""Attention in which every query sees one interval of the keys; exact, with memory linear in the number of tokens.

Packing, causality, sliding windows and context parallelism are the same thing seen from a query: the keys that it may
see lie side by side. A query at place x of a row, in a sequence that begins at s, with a window of w keys before it,
sees [max(s, x - w), x], also where its neighbours in the row are on other ranks. Two integers per query say so.

Blocks of queries meet all the keys that any of them sees at once. Scores exist of one block only, in float32; the
backward pass makes them again from the logarithm of their sum, as FlashAttention does (Dao et al. 2022,
arXiv:2205.14135). A sink is one more key, with a logit of its own per head and the value 0 (GPT-OSS).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_QUERIES = 128
"""Most queries of a block; more would compute scores of too many neighbours that are out of sight."""
_BLOCK_ELEMENTS = 2**22
"""Scores of a block, about: 16 MiB in float32."""


def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax over the visible keys of scale * query . key (and the sink), applied to the values.

    Args:
        query: [Q, heads, channels].
        key: [K, groups, channels]; groups divides heads, and head h reads group h // (heads / groups).
        value: [K, groups, value_channels].
        first, last: [Q] int64 on the CPU: query i sees the keys first[i] ... last[i], at least one.
        scale: factor of the products.
        sinks: [heads] logits of the sinks; None: no sink.

    Returns:
        [Q, heads, value_channels] in the query's dtype, differentiable once in all tensors.

    Raises:
        ValueError: an interval is empty or leaves [0, K).
    """
    if len(first) and not (int(first.min()) >= 0 and bool((first <= last).all()) and int(last.max()) < len(key)):
        raise ValueError(f"queries see empty intervals, or keys outside of [0, {len(key)})")
    out: Tensor = _IntervalAttention.apply(query, key, value, sinks, first, last, scale)
    return out


def _blocks(first: Tensor, last: Tensor, heads: int) -> Iterator[tuple[slice, slice]]:
    """(queries, keys that any of them sees), for all queries in order."""
    starts, stops = first.tolist(), last.tolist()
    begin = 0
    while begin < len(starts):
        low, high, end = starts[begin], stops[begin], begin + 1
        while end < len(starts) and end - begin < _BLOCK_QUERIES:
            new_low, new_high = min(low, starts[end]), max(high, stops[end])
            if (end + 1 - begin) * (new_high + 1 - new_low) * heads > _BLOCK_ELEMENTS and end - begin >= 16:
                break
            low, high, end = new_low, new_high, end + 1
        yield slice(begin, end), slice(low, high + 1)
        begin = end


def _by_group(block: Tensor, groups: int) -> Tensor:
    """[B, heads, channels] -> [groups, B * heads/groups, channels], in the dtype of computation."""
    block = block.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)
    return block.float() if block.dtype in (torch.bfloat16, torch.float16) else block


def _by_token(block: Tensor, tokens: int) -> Tensor:
    """Inverse of `_by_group`: [groups, B * heads/groups, channels] -> [B, heads, channels]."""
    out: Tensor = block.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)
    return out


def _scores(query: Tensor, key: Tensor, seen: tuple[Tensor, Tensor], keys: slice, scale: float) -> Tensor:
    """[groups, B * heads/groups, K] with -inf where a key is out of sight."""
    places = torch.arange(keys.start, keys.stop, device=query.device)
    first, last = seen
    hidden = (places < first[:, None]) | (places > last[:, None])
    scores: Tensor = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
    heads = query.shape[1] // len(first)
    scores.unflatten(1, (len(first), heads)).masked_fill_(hidden[:, None], -torch.inf)
    return scores


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        first: Tensor,
        last: Tensor,
        scale: float,
    ) -> Tensor:
        groups = key.shape[1]
        out = query.new_empty(*query.shape[:2], value.shape[2])
        log_sums = _by_group(query[..., :1], groups)[..., 0].new_empty(query.shape[:2])
        for queries, keys in _blocks(first, last, query.shape[1]):
            k, v = _by_group(key[keys], groups), _by_group(value[keys], groups)
            seen = first[queries].to(query.device), last[queries].to(query.device)
            scores = _scores(_by_group(query[queries], groups), k, seen, keys, scale)
            maximum = scores.amax(-1, keepdim=True)
            of_sink = None if sinks is None else _of_block(sinks, groups, len(seen[0])).to(scores.dtype)
            if of_sink is not None:
                maximum = torch.maximum(maximum, of_sink)
            total = scores.sub_(maximum).exp_().sum(-1, keepdim=True)
            if of_sink is not None:
                total = total + (of_sink - maximum).exp()
            tokens = queries.stop - queries.start
            out[queries] = _by_token(torch.bmm(scores, v).div_(total), tokens).to(out.dtype)
            log_sums[queries] = _by_token(maximum + total.log(), tokens)[..., 0]
        ctx.save_for_backward(query, key, value, sinks, first, last, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, first, last, out, log_sums = ctx.saved_tensors
        groups = key.shape[1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(x, dtype=log_sums.dtype) for x in (key, value))
        # sum_j p_j dp_j = out . grad, for every query and head.
        deltas = (out.to(log_sums.dtype) * grad.to(log_sums.dtype)).sum(-1)
        for queries, keys in _blocks(first, last, query.shape[1]):
            q, k, v, upstream = (_by_group(x, groups) for x in (query[queries], key[keys], value[keys], grad[queries]))
            seen = first[queries].to(query.device), last[queries].to(query.device)
            log_sum, delta = (_by_group(x[queries][..., None], groups) for x in (log_sums, deltas))
            p = _scores(q, k, seen, keys, ctx.scale).sub_(log_sum).exp_()
            grad_value[keys] += torch.bmm(p.transpose(1, 2), upstream).transpose(0, 1)
            of_scores = torch.bmm(upstream, v.transpose(1, 2)).sub_(delta).mul_(p).mul_(ctx.scale)
            grad_key[keys] += torch.bmm(of_scores.transpose(1, 2), q).transpose(0, 1)
            tokens = queries.stop - queries.start
            grad_query[queries] = _by_token(torch.bmm(of_scores, k), tokens).to(query.dtype)
        grad_sinks = None
        if sinks is not None:
            # The sink's value is 0, so its probability only takes away: d loss / d sink = -p_sink (out . grad).
            grad_sinks = -((sinks.to(log_sums.dtype) - log_sums).exp() * deltas).sum(0).to(sinks.dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks, None, None, None


def _of_block(sinks: Tensor, groups: int, tokens: int) -> Tensor:
    """[heads] -> [groups, B * heads/groups, 1]."""
    return _by_group(sinks[None, :, None].expand(tokens, -1, -1), groups)
