"""The output layer by tiles: products of a chunk of tokens with a tile of the weight's rows, and where gradients go.

The logits of a chunk are made tile by tile, so that softmax work finds them in the cache, and in float32 whatever the
dtype of the operands: float16 logits of 20 are 0.01 apart, bfloat16 ones 0.1. On CUDA that is the accumulator of the
product itself, kept; on a CPU, and for float16, whose range is too small for gradients divided by a global count, a
tile's operands are widened.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.parallel.vocab_statistics import statistics_dtype

_TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
"""Logits of a tile. CPU: 4 MiB, in the cache together with its weights. CUDA: 32 MiB, which keeps the products large
and the L2 cache useful."""
_MOST_COLUMNS = {"cpu": 4096, "cuda": 8192}
"""Columns of a tile: 4,096 rows of 896 float32 weights are 15 MB. Fewer cost more calls, more leave the cache."""
_FEW_ROWS = 4
MOST_ROWS = {"cpu": 1024, "cuda": 4096}
"""Tokens of a chunk: the weight, and the gradient that is added to it, pass through the processor once per chunk."""


@dataclass(frozen=True)
class TileShape:
    """Largest tile: tokens x columns."""

    rows: int
    columns: int

    @staticmethod
    def of(weight: Tensor, num_tokens: int, chunk_tokens: int | None, chunk_columns: int | None) -> "TileShape":
        """For `num_tokens` tokens and the columns of `weight`; None: what suits the device.

        Raises:
            ValueError: a size below 1.
        """
        for name, size in (("chunk_tokens", chunk_tokens), ("chunk_columns", chunk_columns)):
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; must be at least 1")
        device = "cuda" if weight.is_cuda else "cpu"
        rows = max(1, min(num_tokens, chunk_tokens or MOST_ROWS[device]))
        columns = chunk_columns or min(_MOST_COLUMNS[device], max(128, _TILE_ELEMENTS[device] // rows))
        return TileShape(rows, min(columns, len(weight)))


def slices(total: int, size: int) -> Iterator[slice]:
    """[0, total) in steps of `size`."""
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))


def product_dtype(operand: Tensor) -> torch.dtype:
    """Dtype in which an operand enters the products."""
    if operand.is_cuda and operand.dtype == torch.bfloat16:
        return torch.bfloat16
    return statistics_dtype(operand.dtype)


def product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out = a @ b, accumulated and kept in out's dtype, which may be wider than the operands'."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out += a @ b; see `product`."""
    if not a.is_cuda and len(a) < _FEW_ROWS:
        # With so few rows a CPU's library adds up one term after another, and loses a digit over 4,000 of them.
        rows = a.new_zeros(_FEW_ROWS, a.shape[1])
        rows[: len(a)] = a
        out.add_(torch.mm(rows, b)[: len(a)])
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))


class WeightGradient:
    """Where the weight's gradient is added up: float32, in place."""

    def __init__(self, weight: Tensor, main_grad: Tensor | None, *, wanted: bool) -> None:
        """Args:
        weight: [n, H].
        main_grad: [n, H] float32 that the gradient is added to; None: a sum of its own, which `result` returns.
        wanted: False: nothing is computed.
        """
        self.dtype = weight.dtype
        self.main_grad = main_grad
        self.total: Tensor | None = None
        if wanted and main_grad is None:
            self.total = torch.zeros_like(weight, dtype=statistics_dtype(weight.dtype))
        elif wanted:
            self.total = main_grad

    def add(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        """The part of a tile: gradient [C, D] of its logits, hidden [C, H], both of `product_dtype`."""
        if self.total is not None:
            add_product(gradient.t(), hidden, out=self.total[columns])

    def result(self) -> Tensor | None:
        """What autograd is to be told: the gradient in the weight's dtype; None where it is in main_grad."""
        return None if self.total is None or self.main_grad is not None else self.total.to(self.dtype)


def gather_tokens(hidden: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """[T, H] of the tokens that sequence parallelism left on the ranks of the group, [T/tp, H] each."""
    if not sequence_parallel or group is None or dist.get_world_size(group) == 1:
        return hidden
    gathered = hidden.new_empty(len(hidden) * dist.get_world_size(group), hidden.shape[1])
    if hidden.numel() > 0:
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
    return gathered


def reduce_tokens(gradient: Tensor, group: ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """The sum over the ranks of the gradient [T, H] of the gathered tokens: this rank's tokens', or all without SP."""
    if group is None or dist.get_world_size(group) == 1:
        return gradient
    if not sequence_parallel:
        if gradient.numel() > 0:
            dist.all_reduce(gradient, group=group)
        return gradient
    reduced = gradient.new_empty(len(gradient) // dist.get_world_size(group), gradient.shape[1])
    if reduced.numel() > 0:
        dist.reduce_scatter_tensor(reduced, gradient, group=group)
    return reduced
