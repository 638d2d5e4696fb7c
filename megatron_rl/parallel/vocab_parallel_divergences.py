"""Divergences, several log-probs per position, and argmax of logits that are sharded by vocabulary.

With p the student's and q the teacher's softmax of their logits / temperature, a divergence D and the function f of its
derivative dD/dp_j (up to a constant, which the softmax takes away) are

    forward          KL(q || p)    D_j = q_j (log q_j - log p_j)              p_j f_j = -q_j
    reverse          KL(p || q)    D_j = p_j (log p_j - log q_j)              p_j f_j = D_j
    jensen_shannon   b KL(q || M) + (1 - b) KL(p || M), M = b q + (1 - b) p   p_j f_j = (1 - b) p_j log(p_j / M_j)

and the gradient of the student's logits is (p_j f_j - p_j sum_k p_k f_k) / temperature. Three collectives forward, two
for the normalisers and one for the sums; none backward, where all is made again from the logits by chunks of tokens.

`ShardedLogits` gives a loss of whole distributions these quantities for some tokens, so that it needs no group.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.parallel.filtered_log_probs import filtered_log_probs
from megatron_rl.parallel.linear_head import slices
from megatron_rl.parallel.vocab_parallel import check_temperature, vocab_parallel_log_probs
from megatron_rl.parallel.vocab_statistics import VocabShard, statistics_dtype

Direction = Literal["forward", "reverse", "jensen_shannon"]


def vocab_parallel_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int,
    direction: Direction,
    mixture: float = 0.5,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> Tensor:
    """Exact divergence of the student's from the teacher's distribution at each position.

    Source: Agarwal et al. 2023, arXiv:2306.13649, section 2 and eq. 1; as `algorithms.distillation_loss`.

    Args:
        student, teacher: [T, V/tp] logits, any floating dtype; the teacher's are constant in the gradient.
        group, vocab_size: see `vocab_parallel_log_probs`.
        direction: see this module's docstring.
        mixture: b in (0, 1), for 'jensen_shannon' alone.
        temperature: divides both logits.
        chunk_tokens: tokens that are computed at once, in several buffers of [chunk_tokens, V/tp].

    Returns:
        [T] float32 (float64 for float64 logits), nats, >= 0; differentiable once.

    Raises:
        ValueError: shapes that differ, an unknown direction, sizes out of range.
    """
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be [T, V/tp]")
    if direction not in ("forward", "reverse", "jensen_shannon"):
        raise ValueError(f"unknown direction {direction!r}; one of 'forward', 'reverse', 'jensen_shannon'")
    if not 0 < mixture < 1:
        raise ValueError(f"mixture is {mixture}; must be in (0, 1)")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; must be at least 1")
    check_temperature(temperature)
    shard = VocabShard(group, vocab_size, student.shape[1])
    result: Tensor = _Divergence.apply(
        student, teacher.detach(), shard, direction, mixture, float(temperature), chunk_tokens
    )
    return result


def vocab_parallel_log_probs_of(
    logits: Tensor,
    ids: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
) -> tuple[Tensor, Tensor]:
    """Log-probs of K tokens at each position, and the mean of all log-probs there.

    The first is what a teacher known by its top K needs (with `with_tail`), the second is label smoothing's.

    Args:
        logits: [T, V/tp], any floating dtype.
        ids: [T, K] int64 in [0, vocab_size), equal on all ranks.
        group, vocab_size, temperature: see `vocab_parallel_log_probs`.
        chunk_tokens: tokens that are computed at once, in a few buffers of [chunk_tokens, V/tp].

    Returns:
        log_probs [T, K] and mean_log_probs [T] over the vocabulary, nats, float32 (float64 for float64 logits);
        differentiable once. One collective forward, none backward.
    """
    if logits.dim() != 2 or ids.dim() != 2 or len(ids) != len(logits):
        raise ValueError(f"logits {tuple(logits.shape)} must be [T, V/tp] and ids {tuple(ids.shape)} [T, K]")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; must be at least 1")
    check_temperature(temperature)
    shard = VocabShard(group, vocab_size, logits.shape[1])
    outputs: tuple[Tensor, Tensor] = _LogProbsOf.apply(logits, ids, shard, float(temperature), chunk_tokens)
    return outputs


def with_tail(log_probs: Tensor) -> Tensor:
    """[T, K] log-probs of some tokens -> [T, K + 1], normalised: the last is the probability of all others together.

    A divergence of these is that of the distributions with the rest of the vocabulary merged: a lower bound.
    """
    rest = (1 - log_probs.exp().sum(1, keepdim=True)).clamp(min=torch.finfo(log_probs.dtype).tiny)
    return torch.cat([log_probs, rest.log()], 1)


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor, *, group: ProcessGroup | None, vocab_size: int) -> Tensor:
    """[T] int64: the token of the largest logit at each position, the first of equal ones; one collective.

    Two models agree where theirs are equal.
    """
    shard = VocabShard(group, vocab_size, logits.shape[1])
    found = logits.new_full((2, len(logits)), -torch.inf, dtype=torch.float64)
    if shard.num_valid > 0:
        value, column = logits[:, : shard.num_valid].max(1)
        found[0], found[1] = value, (column + shard.first).double()
    gathered = shard.all_gather(found)
    # torch's argmax over ranks may take any of equal values: the lowest rank is asked for.
    is_best = gathered[:, 0] == gathered[:, 0].amax(0)
    return torch.where(is_best, gathered[:, 1], torch.inf).amin(0).long()


def log_normalizer(logits: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int) -> Tensor:
    """[T] float64: log of the sum of exp(logits / temperature) over the whole vocabulary; one collective."""
    local = logits.new_full((len(logits),), -torch.inf, dtype=torch.float64)
    if shard.num_valid > 0:
        for rows in slices(len(logits), chunk_tokens):
            local[rows] = _local_log_sum(logits[rows, : shard.num_valid], temperature)
    return torch.logsumexp(shard.all_gather(local), 0)


def _local_log_sum(x: Tensor, temperature: float) -> Tensor:
    """[C] float64: log of the sum of exp(x / temperature) of these columns.

    The difference from the maximum comes before the division: x / temperature itself may be large, and is rounded. The
    float64 logarithm of a float32 sum about the maximum is as exact as the sum.
    """
    maximum = x.amax(1)
    d = x.to(statistics_dtype(x.dtype)) - maximum[:, None]
    return (d / temperature).exp_().sum(1).double().log() + maximum.double() / temperature


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        shard: VocabShard,
        direction: Direction,
        mixture: float,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        normalizers = torch.stack([log_normalizer(x, shard, temperature, chunk_tokens) for x in (student, teacher)])
        ctx.options = (shard, direction, mixture, temperature, chunk_tokens)
        sums = torch.zeros(2, len(student), dtype=torch.float64, device=student.device)
        for rows, log_p, log_q in _log_probs(student, teacher, normalizers, shard, temperature, chunk_tokens):
            divergence, slope = _integrands(log_p, log_q, direction, mixture)
            sums[:, rows] = torch.stack([part.sum(1, dtype=torch.float64) for part in (divergence, slope)])
        # Added in the order of the ranks: all of them get the same bits.
        sums = shard.all_gather(sums).sum(0)
        ctx.save_for_backward(student, teacher, normalizers, sums[1])
        return sums[0].clamp(min=0).to(statistics_dtype(student.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, normalizers, mean_slope = ctx.saved_tensors
        shard, direction, mixture, temperature, chunk_tokens = ctx.options
        grad = torch.zeros_like(student)
        for rows, log_p, log_q in _log_probs(student, teacher, normalizers, shard, temperature, chunk_tokens):
            _, slope = _integrands(log_p, log_q, direction, mixture)
            slope -= log_p.exp() * mean_slope[rows, None].to(log_p.dtype)
            grad[rows, : shard.num_valid] = (slope * (upstream[rows, None] / temperature)).to(grad.dtype)
        return grad, None, None, None, None, None, None


def _log_probs(
    student: Tensor, teacher: Tensor, normalizers: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int
) -> Any:
    """Chunk by chunk: rows, log p and log q [C, num_valid]."""
    dtype = statistics_dtype(student.dtype)
    if shard.num_valid == 0:
        return
    for rows in slices(len(student), chunk_tokens):
        yield (
            rows,
            *(
                # The difference in float64: both may be large.
                (x[rows, : shard.num_valid].double() / temperature - normalizer[rows, None]).to(dtype)
                for x, normalizer in zip((student, teacher), normalizers, strict=True)
            ),
        )


def _integrands(log_p: Tensor, log_q: Tensor, direction: Direction, mixture: float) -> tuple[Tensor, Tensor]:
    """D_j and p_j f_j; see this module's docstring."""
    if direction == "forward":
        q = log_q.exp()
        return q * (log_q - log_p), -q
    if direction == "reverse":
        divergence = log_p.exp() * (log_p - log_q)
        return divergence, divergence.clone()
    log_m = torch.logaddexp(log_q + math.log(mixture), log_p + math.log1p(-mixture))
    of_student = (1 - mixture) * log_p.exp() * (log_p - log_m)
    return mixture * log_q.exp() * (log_q - log_m) + of_student, of_student


class _LogProbsOf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        dtype, column = statistics_dtype(logits.dtype), shard.local(ids)
        # Rows: log of the local sum, sum of the logits / temperature, the K logits / temperature.
        local = logits.new_full((2 + ids.shape[1], len(logits)), -torch.inf, dtype=torch.float64)
        local[1] = 0
        if shard.num_valid > 0:
            for rows in slices(len(logits), chunk_tokens):
                x, of_chunk = logits[rows, : shard.num_valid], column[rows]
                local[0, rows] = _local_log_sum(x, temperature)
                local[1, rows] = x.sum(1, dtype=torch.float64) / temperature
                target = x.gather(1, of_chunk.clamp(min=0)).double() / temperature
                local[2:, rows] = torch.where(of_chunk >= 0, target, -torch.inf).t()
        gathered = shard.all_gather(local)
        log_sum = torch.logsumexp(gathered[:, 0], 0)
        ctx.save_for_backward(logits, column, log_sum)
        ctx.options = (shard, temperature, chunk_tokens)
        ctx.set_materialize_grads(True)
        log_probs = (gathered[:, 2:].amax(0) - log_sum).clamp(max=0).t()
        return log_probs.to(dtype), (gathered[:, 1].sum(0) / shard.vocab_size - log_sum).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        logits, column, log_sum = ctx.saved_tensors
        shard, temperature, chunk_tokens = ctx.options
        grad = torch.zeros_like(logits)
        if shard.num_valid > 0:
            for rows in slices(len(logits), chunk_tokens):
                by_ids, by_mean, of_chunk = grad_log_probs[rows], grad_mean[rows, None], column[rows]
                z = logits[rows, : shard.num_valid].double() / temperature
                p = (z - log_sum[rows, None]).exp_().to(grad_mean.dtype)
                p.mul_(-(by_ids.sum(1, keepdim=True) + by_mean)).add_(by_mean / shard.vocab_size)
                p.scatter_add_(1, of_chunk.clamp(min=0), torch.where(of_chunk >= 0, by_ids, 0.0))
                grad[rows, : shard.num_valid] = p / temperature
        return grad, None, None, None, None


@dataclass(frozen=True)
class ShardedLogits:
    """Of n tokens. All but `argmax` is differentiable, and in nats; collectives are those of the functions called."""

    values: Tensor
    """[n, V/tp], this rank's columns, padding included."""
    labels: Tensor
    """[n] int64."""
    slots: slice
    """Which tokens of the head's call they are."""
    group: ProcessGroup | None
    vocab_size: int
    temperature: float
    """Divides the logits; it has not yet."""

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Log-probs of the labels [n] and entropy [n]."""
        log_probs, entropy = vocab_parallel_log_probs(
            self.values, self.labels, group=self.group, vocab_size=self.vocab_size, temperature=self.temperature
        )
        assert entropy is not None
        return log_probs, entropy

    def log_probs_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [n, K] of the tokens ids [n, K], and the mean [n] of all log-probs, label smoothing's."""
        return vocab_parallel_log_probs_of(
            self.values, ids, group=self.group, vocab_size=self.vocab_size, temperature=self.temperature
        )

    def divergence(self, teacher: Tensor, direction: Direction, mixture: float = 0.5) -> Tensor:
        """Exact divergence [n] from a teacher's logits [n, V/tp]; see `vocab_parallel_divergence`."""
        return vocab_parallel_divergence(
            self.values,
            teacher,
            group=self.group,
            vocab_size=self.vocab_size,
            direction=direction,
            mixture=mixture,
            temperature=self.temperature,
        )

    def filtered_log_probs(self, *, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
        """Log-probs [n] of the labels under filtered sampling; see `filtered_log_probs`."""
        return filtered_log_probs(
            self.values,
            self.labels,
            group=self.group,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def argmax(self) -> Tensor:
        """[n] int64: the most probable tokens."""
        return vocab_parallel_argmax(self.values, group=self.group, vocab_size=self.vocab_size)
