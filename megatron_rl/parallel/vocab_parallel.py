"""Log-probs and entropy of tokens whose logits are sharded by vocabulary over the ranks of a group.

Each rank reduces its own columns to four numbers per token, about its own maximum m_r, with z = logits / temperature:

    m_r = max_j x_j     s_r = sum_j exp(z_j - m_r/temperature)     u_r = sum_j exp(d_j) d_j, d_j = z_j - m_r/temperature
    t_r = d_label, on the rank that owns the label

One all-gather of these [4, T] numbers gives every rank all it needs, and the [T] rest is done in float64:

    M = max_r m_r     w_r = exp((m_r - M)/temperature)     S = sum_r w_r s_r
    log p(label) = t + (m_owner - M)/temperature - log S
    entropy      = log S - sum_r w_r (u_r + s_r (m_r - M)/temperature) / S

The rank that holds M contributes s >= exp(0), so S >= 1 and log-probs are never above 0. Nothing is subtracted from
large numbers but their own maximum, so logits of any finite size are as good as small ones.

The backward pass needs no communication: with d = z - M/temperature, p = exp(d)/S and the incoming gradients g, h,

    d loss / d z_j = g (1[j = label] - p_j) - h p_j (d_j - log S + entropy)

It is recomputed from the logits, which are the only large tensor that is kept, and which are not written to. Both
passes walk over the tokens in chunks, so that float32 copies exist of one chunk only.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

_CPU_BUFFER_ELEMENTS = 2**20
"""Elements of one chunk's buffer on a CPU, 4 MiB of float32: three times as fast as 1,024 rows of a 152k vocabulary,
whose buffers come as fresh pages from the system on every call."""


def vocab_parallel_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    entropy: bool = True,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label, and the entropy of each distribution, under softmax(logits / temperature).

    Rank r of the group holds columns [r n, (r + 1) n) of the padded vocabulary, n = V/tp. Columns from vocab_size on
    are padding: their probability is exactly 0 and their gradient too, whatever they hold. All ranks get equal results,
    bit for bit. As everywhere in tensor parallelism, every rank is to apply the same loss to them.

    Args:
        logits: [T, V/tp], any floating dtype, finite. Left untouched. Its gradient has its dtype.
        labels: [T] int64, equal on all ranks. A label outside [0, vocab_size) has log-prob nan.
        group: the tensor-parallel group; None: this rank holds the whole vocabulary.
        vocab_size: columns that are tokens.
        temperature: divides the logits, > 0.
        entropy: also compute the entropy; costs a second buffer and about a fifth of the time.
        chunk_tokens: most tokens that are computed at once, with two buffers of [chunk_tokens, V/tp] float32. On a CPU
            fewer are taken where such a buffer would leave the cache.

    Returns:
        log_probs [T], nats, <= 0, and entropy [T], nats, in [0, log vocab_size], or None. Both are float32 (float64 for
        float64 logits) and differentiable once.

    Raises:
        ValueError: shapes, vocab_size, temperature or chunk_tokens that make no sense; before the collective.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be [T, V/tp] and labels {tuple(labels.shape)} [T]")
    if not 0 < vocab_size <= logits.shape[1] * ranks:
        raise ValueError(f"vocab_size is {vocab_size}; {ranks} ranks of {logits.shape[1]} columns hold fewer, or none")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; must be positive and finite")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; must be at least 1")
    if logits.device.type == "cpu":
        chunk_tokens = min(chunk_tokens, max(1, _CPU_BUFFER_ELEMENTS // logits.shape[1]))
    outputs: tuple[Tensor, Tensor | None] = _VocabParallelLogProbs.apply(
        logits, labels, group, vocab_size, float(temperature), entropy, chunk_tokens
    )
    return outputs


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        group: ProcessGroup | None,
        vocab_size: int,
        temperature: float,
        entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        rank, num_columns = (0 if group is None else dist.get_rank(group)), logits.shape[1]
        num_valid = min(max(vocab_size - rank * num_columns, 0), num_columns)
        local_labels = labels - rank * num_columns
        owned = (local_labels >= 0) & (local_labels < num_valid)
        local_labels = local_labels.clamp(0, max(num_valid - 1, 0))

        statistics = _local_statistics(logits[:, :num_valid], local_labels, temperature, entropy, chunk_tokens)
        gathered = _all_gather(statistics, group).double()
        owner = (labels // num_columns).clamp(0, len(gathered) - 1)
        maximum, log_sum, log_probs, entropies = _combine(gathered, owner, temperature)
        log_probs = torch.where((labels >= 0) & (labels < vocab_size), log_probs, torch.nan)
        if entropies is not None:
            entropies = entropies.clamp(0.0, math.log(vocab_size))  # Rounding alone can leave this range.

        dtype = statistics.dtype
        ctx.save_for_backward(logits, local_labels, owned, maximum.to(dtype), log_sum, entropies)
        ctx.num_valid, ctx.temperature, ctx.chunk_tokens = num_valid, temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return log_probs.to(dtype), None if entropies is None else entropies.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, local_labels, owned, maximum, log_sum, entropies = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 7
        # grad_j = exp(d_j) (offset + slope d_j), plus at_label in the label's column: the formula above, with 1/S and
        # the temperature's 1/T drawn into the per-token factors.
        at_label = torch.zeros_like(log_sum) if grad_log_probs is None else grad_log_probs.double() / ctx.temperature
        slope = None
        offset = -at_label
        if grad_entropy is not None:
            slope = -grad_entropy.double() / ctx.temperature
            offset = offset + slope * (entropies - log_sum)
            slope = slope * torch.exp(-log_sum)
        offset = offset * torch.exp(-log_sum)
        at_label = torch.where(owned, at_label, 0.0)

        dtype = maximum.dtype
        grad = torch.empty_like(logits)
        grad[:, ctx.num_valid :] = 0
        if ctx.num_valid > 0:
            _local_gradient(
                grad[:, : ctx.num_valid],
                logits[:, : ctx.num_valid],
                local_labels,
                maximum,
                offset.to(dtype),
                None if slope is None else slope.to(dtype),
                at_label.to(dtype),
                ctx.temperature,
                ctx.chunk_tokens,
            )
        return grad, None, None, None, None, None, None


def _local_statistics(
    logits: Tensor, local_labels: Tensor, temperature: float, entropy: bool, chunk_tokens: int
) -> Tensor:
    """[3 or 4, T]: m_r, s_r, t_r and, for the entropy, u_r, of this rank's valid columns [T, num_valid]."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_tokens, num_valid = logits.shape
    statistics = logits.new_zeros(4 if entropy else 3, num_tokens, dtype=dtype)
    if num_valid == 0:
        # A maximum that loses against every logit; finite, because 0 * inf is nan.
        statistics[0] = torch.finfo(dtype).min
        return statistics
    shifted = logits.new_empty(min(chunk_tokens, num_tokens), num_valid, dtype=dtype)
    exponentials = torch.empty_like(shifted) if entropy else shifted
    for first in range(0, num_tokens, chunk_tokens):
        rows = slice(first, min(first + chunk_tokens, num_tokens))
        x = logits[rows]
        maximum = x.amax(1, keepdim=True).to(dtype)
        d, e = shifted[: len(x)], exponentials[: len(x)]
        _shift(x, maximum, temperature, out=d)
        statistics[0, rows] = maximum[:, 0]
        statistics[2, rows] = d.gather(1, local_labels[rows, None])[:, 0]
        torch.exp(d, out=e)
        statistics[1, rows] = e.sum(1)
        if entropy:
            statistics[3, rows] = d.mul_(e).sum(1)
    return statistics


def _combine(gathered: Tensor, owner: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """M, log S, log p(label) and entropy, each [T] float64, from all ranks' statistics [tp, 3 or 4, T]."""
    maximum = gathered[:, 0].amax(0)
    shift = (gathered[:, 0] - maximum) / temperature
    weights = shift.exp()
    sums = weights * gathered[:, 1]
    total = sums.sum(0)
    log_sum = total.log()
    target = (gathered[:, 2] + shift).gather(0, owner[None])[0]
    if gathered.shape[1] == 3:
        return maximum, log_sum, target - log_sum, None
    moment = (weights * gathered[:, 3] + sums * shift).sum(0)
    return maximum, log_sum, target - log_sum, log_sum - moment / total


def _local_gradient(
    grad: Tensor,
    logits: Tensor,
    local_labels: Tensor,
    maximum: Tensor,
    offset: Tensor,
    slope: Tensor | None,
    at_label: Tensor,
    temperature: float,
    chunk_tokens: int,
) -> None:
    """Fill grad [T, num_valid] with exp(d) (offset + slope d), and at_label added in the label's column."""
    shifted = maximum.new_empty(min(chunk_tokens, len(logits)), logits.shape[1])
    exponentials = shifted if slope is None else torch.empty_like(shifted)
    for first in range(0, len(logits), chunk_tokens):
        rows = slice(first, min(first + chunk_tokens, len(logits)))
        x = logits[rows]
        d, e = shifted[: len(x)], exponentials[: len(x)]
        _shift(x, maximum[rows, None], temperature, out=d)
        torch.exp(d, out=e)
        if slope is None:
            d.mul_(offset[rows, None])
        else:
            torch.addcmul(offset[rows, None], d, slope[rows, None], out=d)
            d.mul_(e)
        d.scatter_add_(1, local_labels[rows, None], at_label[rows, None])
        grad[rows] = d


def _shift(x: Tensor, maximum: Tensor, temperature: float, *, out: Tensor) -> None:
    """out = (x - maximum) / temperature. The difference comes first: it is exact where it matters, near the maximum."""
    torch.sub(x, maximum, out=out)
    if temperature != 1.0:
        out.mul_(1.0 / temperature)


def _all_gather(statistics: Tensor, group: ProcessGroup | None) -> Tensor:
    """[tp, ...] of every rank's statistics, in rank order: the one collective."""
    if group is None or dist.get_world_size(group) == 1:
        return statistics[None]
    gathered = statistics.new_empty(dist.get_world_size(group), *statistics.shape)
    if statistics.numel() > 0:
        dist.all_gather(list(gathered), statistics, group=group)
    return gathered
