"""Log-probs and entropy of tokens whose logits are sharded by vocabulary over the ranks of a group.

The mathematics is in `vocab_statistics`: each rank reduces its columns to four numbers per token, one all-gather of
these [4, T] numbers gives every rank all it needs, and the backward pass needs no communication. The gradient is
recomputed from the logits, which are the only large tensor that is kept, and which are not written to. Both passes walk
over the tokens in chunks, so that float32 copies exist of one chunk only.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.parallel.vocab_statistics import (
    GradientFactors,
    Normalizer,
    VocabShard,
    gradient_of_logits,
    no_statistics,
    normalize,
    reduce_tile,
    statistics_dtype,
)

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
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be [T, V/tp] and labels {tuple(labels.shape)} [T]")
    shard = VocabShard(group, vocab_size, logits.shape[1])
    check_temperature(temperature)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; must be at least 1")
    if logits.device.type == "cpu":
        chunk_tokens = min(chunk_tokens, max(1, _CPU_BUFFER_ELEMENTS // logits.shape[1]))
    outputs: tuple[Tensor, Tensor | None] = _VocabParallelLogProbs.apply(
        logits, labels, shard, float(temperature), entropy, chunk_tokens
    )
    return outputs


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless it is positive and finite."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; must be positive and finite")


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        shard: VocabShard,
        temperature: float,
        entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        dtype, num_tokens, num_valid = statistics_dtype(logits.dtype), len(logits), shard.num_valid
        columns = shard.local(labels)
        local = no_statistics(num_tokens, entropy, dtype=dtype, device=logits.device)
        if num_valid > 0:
            for rows, out, scratch in _chunks(logits, num_valid, chunk_tokens, dtype):
                local[:, rows] = reduce_tile(
                    logits[rows, :num_valid],
                    columns[rows],
                    temperature=temperature,
                    entropy=entropy,
                    out=out,
                    scratch=scratch,
                )
        log_probs, normalizer = normalize(local, labels, shard, temperature, dtype=dtype)
        ctx.save_for_backward(logits, columns, normalizer.maximum, normalizer.log_sum, normalizer.entropy)
        ctx.num_valid, ctx.temperature, ctx.chunk_tokens = num_valid, temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return log_probs.to(dtype), None if normalizer.entropy is None else normalizer.entropy.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, columns, *normalizer = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 6
        factors = GradientFactors.of(grad_log_probs, grad_entropy, Normalizer(*normalizer), ctx.temperature)
        maximum = normalizer[0]
        grad = torch.empty_like(logits)
        grad[:, ctx.num_valid :] = 0
        if ctx.num_valid > 0:
            for rows, out, scratch in _chunks(logits, ctx.num_valid, ctx.chunk_tokens, maximum.dtype):
                gradient_of_logits(
                    logits[rows, : ctx.num_valid],
                    columns[rows],
                    maximum[rows],
                    factors[rows],
                    temperature=ctx.temperature,
                    out=out,
                    scratch=scratch,
                )
                grad[rows, : ctx.num_valid] = out
        return grad, None, None, None, None, None


def _chunks(
    logits: Tensor, num_valid: int, chunk_tokens: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The tokens' rows chunk by chunk, with two buffers [C, num_valid] that every chunk uses again."""
    num_tokens = len(logits)
    out = logits.new_empty(min(chunk_tokens, num_tokens), num_valid, dtype=dtype)
    scratch = torch.empty_like(out)
    for first in range(0, num_tokens, chunk_tokens):
        size = min(chunk_tokens, num_tokens - first)
        yield slice(first, first + size), out[:size], scratch[:size]
