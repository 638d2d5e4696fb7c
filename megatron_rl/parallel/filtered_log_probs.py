"""Log-probs under top-k and top-p sampling: the distribution that was sampled from, not the one before the filter.

A filter keeps the tokens whose logit reaches a threshold: the k-th largest logit; of those, the largest threshold whose
tokens have at least the probability top_p together. The sampled token is always kept: the engine kept it, and rounding
may decide otherwise here. Tokens of equal logits are kept or dropped together.

The threshold is found exactly, without sorting or gathering a sharded vocabulary: logits are mapped to integers of the
same order, and the integer is found digit by digit, each from a histogram of 256 bins that is summed over the ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.parallel.linear_head import slices
from megatron_rl.parallel.vocab_parallel import check_temperature
from megatron_rl.parallel.vocab_statistics import VocabShard

_DIGIT_BITS, _KEY_BITS = 8, 32


def filtered_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    chunk_tokens: int = 256,
) -> Tensor:
    """Log-probability of each sampled token under softmax(logits / temperature), filtered and renormalised.

        log p(label) = z_label - log sum_{j kept} exp(z_j)

    The order is vLLM's: temperature, top-k, then top-p of what is left. The kept set is constant in the gradient.

    Args:
        logits: [T, V/tp], any floating dtype up to float32, finite. Left untouched.
        labels: [T] int64 in [0, vocab_size), equal on all ranks.
        group, vocab_size, temperature: see `vocab_parallel_log_probs`.
        top_k: tokens to keep; None: all.
        top_p: probability to keep, in (0, 1].
        chunk_tokens: tokens that are computed at once, in several buffers of [chunk_tokens, V/tp].

    Returns:
        [T] float32, nats, <= 0; differentiable once. Collectives forward, per chunk: 2, and 4 more for
        top_k, 5 more for top_p; backward none.

    Raises:
        ValueError: shapes, sizes or filters out of range.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be [T, V/tp] and labels {tuple(labels.shape)} [T]")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; must be at least 1, or null for all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; must be in (0, 1]")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; must be at least 1")
    check_temperature(temperature)
    shard = VocabShard(group, vocab_size, logits.shape[1])
    filters = (None if top_k is None or top_k >= vocab_size else top_k, top_p)
    result: Tensor = _FilteredLogProbs.apply(logits, labels, shard, filters, float(temperature), chunk_tokens)
    return result


class _FilteredLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        shard: VocabShard,
        filters: tuple[int | None, float],
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        column = shard.local(labels)
        log_probs = logits.new_empty(len(logits), dtype=torch.float32)
        log_sum = logits.new_empty(len(logits), dtype=torch.float64)
        threshold = torch.empty_like(labels)
        for rows in slices(len(logits), chunk_tokens):
            x = logits[rows, : shard.num_valid].float()
            threshold[rows], log_sum[rows], target = _filter(x, column[rows], shard, filters, temperature)
            log_probs[rows] = (target / temperature - log_sum[rows]).clamp(max=0).float()
        ctx.save_for_backward(logits, column, threshold, log_sum)
        ctx.options = (shard, temperature, chunk_tokens)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, column, threshold, log_sum = ctx.saved_tensors
        shard, temperature, chunk_tokens = ctx.options
        grad = torch.zeros_like(logits)
        for rows in slices(len(logits), chunk_tokens):
            x = logits[rows, : shard.num_valid].float()
            if x.shape[1] == 0:
                continue
            kept = _kept(_ordered(x), threshold[rows], column[rows])
            p = torch.where(kept, (x.double() / temperature - log_sum[rows, None]).exp(), 0.0).float()
            g = p.mul_(-upstream[rows, None])
            owned = column[rows] >= 0
            g.scatter_add_(1, column[rows].clamp(min=0)[:, None], torch.where(owned, upstream[rows], 0.0)[:, None])
            grad[rows, : shard.num_valid] = (g / temperature).to(grad.dtype)
        return grad, None, None, None, None, None


def _filter(
    x: Tensor, column: Tensor, shard: VocabShard, filters: tuple[int | None, float], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold [C] int64 of the ordered keys, log of the kept sum [C] and the label's logit [C], both float64."""
    top_k, top_p = filters
    local = x.new_full((2, len(x)), -torch.inf, dtype=torch.float64)
    if x.shape[1] > 0:
        local[0] = x.amax(1)
        local[1] = torch.where(column >= 0, x.gather(1, column.clamp(min=0)[:, None])[:, 0].double(), -torch.inf)
    maximum, target = shard.all_gather(local).amax(0)
    keys = _ordered(x)
    mass = ((x.double() - maximum[:, None]) / temperature).exp()
    threshold = torch.zeros_like(column)
    if top_k is not None:
        threshold = _threshold(keys, torch.ones_like(mass), torch.full_like(maximum, top_k), shard)
    if top_p < 1:
        left = torch.where(keys >= threshold[:, None], mass, 0.0)
        total = shard.all_gather(left.sum(1)).sum(0)
        threshold = torch.maximum(threshold, _threshold(keys, left, top_p * total, shard))
    kept = torch.where(_kept(keys, threshold, column), mass, 0.0).sum(1)
    return threshold, shard.all_gather(kept).sum(0).log() + maximum / temperature, target


def _kept(keys: Tensor, threshold: Tensor, column: Tensor) -> Tensor:
    """[C, D] bool."""
    columns = torch.arange(keys.shape[1], device=keys.device)
    return (keys >= threshold[:, None]) | (columns == column[:, None])


def _ordered(x: Tensor) -> Tensor:
    """int64 in [0, 2^32) of the same order as the float32 numbers x: negative ones have all bits turned."""
    # 0.0 and -0.0 are equal numbers and must be equal keys.
    bits = (x + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + 2**31


def _threshold(keys: Tensor, mass: Tensor, target: Tensor, shard: VocabShard) -> Tensor:
    """[C]: the largest key t for which the mass of keys >= t is at least `target`; 0 if there is none."""
    prefix = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
    above = torch.zeros_like(target)
    for shift in range(_KEY_BITS - _DIGIT_BITS, -1, -_DIGIT_BITS):
        # Of the keys that share the digits found so far, the mass by the next digit.
        shares = (keys >> (shift + _DIGIT_BITS)) == prefix[:, None]
        digit = (keys >> shift) & (2**_DIGIT_BITS - 1)
        histogram = mass.new_zeros(len(keys), 2**_DIGIT_BITS)
        histogram.scatter_add_(1, digit, torch.where(shares, mass, 0.0))
        histogram = shard.all_gather(histogram).sum(0)
        reached = above[:, None] + histogram.flip(1).cumsum(1).flip(1)  # mass of this digit and all higher ones
        enough = reached >= target[:, None]
        found = torch.where(enough, torch.arange(2**_DIGIT_BITS, device=keys.device), 0).amax(1)
        above = reached.gather(1, found[:, None])[:, 0] - histogram.gather(1, found[:, None])[:, 0]
        prefix = (prefix << _DIGIT_BITS) | found
    return prefix
