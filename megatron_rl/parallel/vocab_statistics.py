"""What a part of the vocabulary contributes to a token's log-prob and entropy, and how parts are joined.

A part is a tile of columns, or all columns of a rank. With z = logits / temperature it is reduced to four numbers per
token, about its own maximum m:

    m = max_j x_j     s = sum_j exp(d_j)     t = x_label, -inf where the label is elsewhere     u = sum_j exp(d_j) d_j
    with d_j = (x_j - m) / temperature

Parts are joined in float64 by shifting each to the common maximum M, shift = (m - M) / temperature:

    S = sum exp(shift) s     U = sum exp(shift) (u + s shift)     T = max t

    log p(label) = (T - M) / temperature - log S          entropy = log S - U / S

Nothing is subtracted from large numbers but their own maximum, so logits of any finite size are as good as small ones.
The part that holds M contributes s >= exp(0), so S >= 1 and log-probs are never above 0.

With p = exp(d) / S and the incoming gradients g of the log-prob and h of the entropy, the gradient needs no further
communication:

    d loss / d z_j = g (1[j = label] - p_j) - h p_j (d_j - log S + entropy),   d about M
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.parallel import triton_kernels


@dataclass(frozen=True)
class VocabShard:
    """Which tokens this rank's columns are: rank r holds [r n, (r + 1) n) of the padded vocabulary, n = num_columns."""

    group: ProcessGroup | None
    """The tensor-parallel group; None: this rank holds all columns."""
    vocab_size: int
    """Columns, over all ranks, that are tokens; the others are padding, whose probability is exactly 0."""
    num_columns: int
    """Columns of this rank, padding included."""

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= self.num_columns * self.num_ranks:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; {self.num_ranks} ranks of {self.num_columns} columns hold fewer, "
                "or none"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def first(self) -> int:
        """Token of this rank's first column."""
        return 0 if self.group is None else dist.get_rank(self.group) * self.num_columns

    @property
    def num_valid(self) -> int:
        """Columns of this rank that are tokens; they come first."""
        return min(max(self.vocab_size - self.first, 0), self.num_columns)

    def local(self, labels: Tensor) -> Tensor:
        """This rank's column of each label; -1 where the label is another rank's, or no token."""
        column = labels - self.first
        return torch.where((column >= 0) & (column < self.num_valid), column, -1)

    def all_gather(self, statistics: Tensor) -> Tensor:
        """[tp, ...]: every rank's statistics, in rank order; one collective, none of one rank or of no tokens."""
        if self.group is None or self.num_ranks == 1 or statistics.numel() == 0:
            return statistics[None]
        gathered = statistics.new_empty(self.num_ranks, *statistics.shape)
        dist.all_gather(list(gathered), statistics.contiguous(), group=self.group)
        return gathered


@dataclass(frozen=True)
class Normalizer:
    """Of each token over the whole vocabulary, [T] each: all that the gradient needs."""

    maximum: Tensor
    """M, in the dtype of the arithmetic (float32; float64 for float64 logits)."""
    log_sum: Tensor
    """log S, float64."""
    entropy: Tensor | None
    """float64, in [0, log vocab_size]."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic on logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_statistics(num_tokens: int, entropy: bool, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[3 or 4, T] of a part without columns. Its maximum, float32's smallest number, loses against every logit; it is
    finite, also after a division by the temperature in float64, because 0 * inf is nan.
    """
    statistics = torch.zeros(4 if entropy else 3, num_tokens, dtype=dtype, device=device)
    statistics[0] = torch.finfo(torch.float32).min
    statistics[2] = -torch.inf
    return statistics


def reduce_tile(
    x: Tensor, column: Tensor, *, temperature: float, entropy: bool, out: Tensor, scratch: Tensor, keep: bool = False
) -> Tensor:
    """[3 or 4, C] statistics (m, s, t and, for the entropy, u) of a tile.

    Args:
        x: [C, D], at least one column, any floating dtype.
        column: [C] int64, the label's column in the tile; anything outside [0, D) where it has none.
        temperature: divides the logits.
        entropy: also compute u.
        out: [C, D] in `statistics_dtype`, overwritten; may be x.
        scratch: [C, D] like out, and not out; overwritten, if the entropy is asked for.
        keep: leave exp((x - m) / temperature) in `out`; otherwise it holds anything.
    """
    if triton_kernels.can_run(x):
        kept = out if keep else None
        return triton_kernels.reduce_tile(x, column, temperature=temperature, entropy=entropy, out=kept)
    owned = (column >= 0) & (column < x.shape[1])
    maximum = x.amax(1).to(out.dtype)
    target = x.gather(1, column.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
    d = scratch if entropy else out
    _shift(x, maximum, temperature, out=d)
    e = torch.exp(d, out=out)
    rows = [maximum, e.sum(1), torch.where(owned, target, -torch.inf).to(out.dtype)]
    if entropy:
        rows.append(d.mul_(e).sum(1))
    return torch.stack(rows)


def join(parts: Tensor, temperature: float) -> Tensor:
    """[3 or 4, T] float64 statistics of [R, 3 or 4, T] parts."""
    parts = parts.double()
    maximum = parts[:, 0].amax(0)
    shift = (parts[:, 0] - maximum) / temperature
    weights = shift.exp()
    sums = weights * parts[:, 1]
    rows = [maximum, sums.sum(0), parts[:, 2].amax(0)]
    if parts.shape[1] == 4:
        rows.append((weights * parts[:, 3] + sums * shift).sum(0))
    return torch.stack(rows)


def normalize(
    local: Tensor, labels: Tensor, shard: VocabShard, temperature: float, *, dtype: torch.dtype
) -> tuple[Tensor, Normalizer]:
    """log p(label) [T] float64 and the normaliser, from every rank's joined statistics; the one collective.

    Args:
        local: [3 or 4, T], of all columns of this rank.
        labels: [T] int64; one that is no token has log-prob nan.
        shard: of this rank.
        temperature: divides the logits.
        dtype: of the arithmetic.
    """
    joined = join(shard.all_gather(local.to(dtype)), temperature) if shard.num_ranks > 1 else local.double()
    maximum, total, target = joined[:3]
    log_sum = total.log()
    log_probs = (target - maximum) / temperature - log_sum
    log_probs = torch.where((labels >= 0) & (labels < shard.vocab_size), log_probs, torch.nan)
    entropy = None
    if len(joined) == 4:
        # Rounding alone can leave this range.
        entropy = (log_sum - joined[3] / total).clamp(0.0, math.log(shard.vocab_size))
    return log_probs, Normalizer(maximum.to(dtype), log_sum, entropy)


@dataclass(frozen=True)
class GradientFactors:
    """Per-token factors, [T] each, of d loss / d x_j = exp(d_j) (offset + slope d_j) + at_label 1[j = label].

    1/S and the temperature's 1/T are drawn into them.
    """

    offset: Tensor
    slope: Tensor | None
    """None: the entropy has no gradient."""
    at_label: Tensor

    @staticmethod
    def of(
        grad_log_probs: Tensor | None, grad_entropy: Tensor | None, normalizer: Normalizer, temperature: float
    ) -> "GradientFactors":
        """Of the gradients g and h [T] of log-probs and entropy; a missing one is 0."""
        log_sum, dtype = normalizer.log_sum, normalizer.maximum.dtype
        at_label = torch.zeros_like(log_sum) if grad_log_probs is None else grad_log_probs.double() / temperature
        offset, slope = -at_label, None
        if grad_entropy is not None:
            assert normalizer.entropy is not None
            slope = -grad_entropy.double() / temperature
            offset = offset + slope * (normalizer.entropy - log_sum)
            slope = (slope * torch.exp(-log_sum)).to(dtype)
        return GradientFactors((offset * torch.exp(-log_sum)).to(dtype), slope, at_label.to(dtype))

    def __getitem__(self, rows: slice) -> "GradientFactors":
        return GradientFactors(self.offset[rows], None if self.slope is None else self.slope[rows], self.at_label[rows])


def gradient_of_logits(
    x: Tensor,
    column: Tensor,
    maximum: Tensor,
    factors: GradientFactors,
    *,
    temperature: float,
    out: Tensor,
    scratch: Tensor,
) -> None:
    """Fill `out` with the gradient of a tile's logits.

    Args:
        x: [C, D] logits, any floating dtype.
        column: [C] int64, the label's column in the tile; anything outside [0, D) where it has none.
        maximum: [C], over the whole vocabulary.
        factors: of the C tokens.
        temperature: divides the logits.
        out: [C, D] in maximum's dtype; may be x. Of another dtype, x must be of maximum's, and is overwritten.
        scratch: [C, D] of maximum's dtype, neither x nor out; overwritten, if factors.slope is given.
    """
    if triton_kernels.can_run(x):
        _triton_gradient(x, column, maximum, factors, 1.0 / temperature, out, exponentials=False)
        return
    d = out if out.dtype == maximum.dtype else x
    _shift(x, maximum, temperature, out=d)
    if factors.slope is None:
        d.exp_().mul_(factors.offset[:, None])
    else:
        e = torch.exp(d, out=scratch)
        torch.addcmul(factors.offset[:, None], d, factors.slope[:, None], out=d).mul_(e)
    _add_at_label(d, column, factors.at_label)
    if d is not out:
        out.copy_(d)


def gradient_of_exponentials(
    e: Tensor, column: Tensor, shift: Tensor, factors: GradientFactors, *, out: Tensor, scratch: Tensor
) -> None:
    """As `gradient_of_logits`, from what `reduce_tile` left: e about the tile's own maximum m.

    Args:
        e: [C, D] exp((x - m) / temperature); overwritten.
        column: [C] int64, the label's column in the tile; anything outside [0, D) where it has none.
        shift: [C], (m - M) / temperature, <= 0.
        factors: of the C tokens.
        out: [C, D] of any floating dtype; may be e.
        scratch: [C, D] like e, and neither e nor out; overwritten, if factors.slope is given.
    """
    if triton_kernels.can_run(e):
        _triton_gradient(e, column, shift, factors, 1.0, out, exponentials=True)
        return
    scale = shift.exp()
    if factors.slope is None:
        e.mul_((factors.offset * scale)[:, None])
    else:
        # d = log e + shift; where e underflowed to 0 the bound of its logarithm keeps the product 0.
        d = torch.log(e, out=scratch).clamp_(min=_SMALLEST_LOG)
        torch.addcmul((factors.offset + factors.slope * shift)[:, None], d, factors.slope[:, None], out=d)
        e.mul_(d).mul_(scale[:, None])
    _add_at_label(e, column, factors.at_label)
    if e is not out:
        out.copy_(e)


def _triton_gradient(
    x: Tensor,
    column: Tensor,
    shift: Tensor,
    factors: GradientFactors,
    inverse_temperature: float,
    out: Tensor,
    *,
    exponentials: bool,
) -> None:
    triton_kernels.gradient(
        x,
        column,
        shift,
        factors.offset,
        factors.slope,
        factors.at_label,
        inverse_temperature=inverse_temperature,
        exponentials=exponentials,
        out=out,
    )


_SMALLEST_LOG = -1e3
"""Below the logarithm of any positive number, also of float64's subnormals (-744.4)."""


def _shift(x: Tensor, maximum: Tensor, temperature: float, *, out: Tensor) -> None:
    """out = (x - maximum) / temperature. The difference comes first: it is exact where it matters, near the maximum."""
    torch.sub(x, maximum[:, None], out=out)
    if temperature != 1.0:
        out.mul_(1.0 / temperature)


def _add_at_label(gradient: Tensor, column: Tensor, at_label: Tensor) -> None:
    owned = (column >= 0) & (column < gradient.shape[1])
    index = column.clamp(0, gradient.shape[1] - 1)[:, None]
    gradient.scatter_add_(1, index, torch.where(owned, at_label, 0.0)[:, None])
