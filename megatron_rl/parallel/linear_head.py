"""What the fused output heads share: their arguments, products tile by tile, and gradients.

`HeadArguments` and `LinearHead` check the arguments of every fused head in one place. `TileShape`, `buffers` and `fit`
give the tiles and the memory that they share.

The logits of a chunk of tokens are made tile by tile, so that softmax work finds them in the cache, and in float32
whatever the dtype of the operands: float16 logits of 20 are 0.01 apart, bfloat16 ones 0.1. On CUDA that is the
accumulator of the product itself, kept; on a CPU, and for float16, whose range is too small for gradients divided by a
global count, a tile's operands are widened (`product`, `add_product`, `WeightGradient`).

`with_formed_gradient` returns a loss whose gradient was formed in the forward pass; the backward pass only scales it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Required, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.parallel import triton_kernels
from megatron_rl.parallel.vocab_parallel import check_temperature
from megatron_rl.parallel.vocab_statistics import VocabShard, statistics_dtype

_TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
"""Logits of a tile. CPU: 4 MiB, in the cache together with its weights. CUDA: 32 MiB, which keeps the products large
and the L2 cache useful."""
_MOST_COLUMNS = {"cpu": 4096, "cuda": 8192}
"""Columns of a tile: 4,096 rows of 896 float32 weights are 15 MB. Fewer cost more calls, more leave the cache."""
_ALIGNED_COLUMNS = 128
"""On CUDA tiles have a multiple of so many columns: a row of bfloat16 that is no multiple of 16 bytes costs cuBLAS its
fastest kernels, and Triton its 128-bit accesses."""
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
        if device == "cuda" and chunk_columns is None:
            columns -= columns % _ALIGNED_COLUMNS
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
        # The product's own accumulator begins with the sum: no float32 product is written and read again.
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


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
        """What autograd gets: the gradient in the weight's dtype; None where it is in main_grad."""
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


_KERNEL_ROWS = 16
"""Rows that a kernel of matrix products takes at once: a chunk is a multiple of it."""


class HeadArguments(TypedDict, total=False):
    """Keyword arguments of every fused head, beside its hidden states [T, H], weight [V/tp, H] and labels [T]."""

    group: Required[ProcessGroup | None]
    """The tensor-parallel group; None: this rank holds the whole vocabulary."""
    vocab_size: Required[int]
    """Rows of the weight, over all ranks, that are tokens; the others have probability exactly 0."""
    temperature: float
    """Divides the logits, > 0; 1 unless given."""
    sequence_parallel: bool
    """The tokens are split over the group, in rank order: hidden is [T/tp, H], this rank's. False unless given."""
    main_grad: Tensor | None
    """[V/tp, H] float32, to which the weight's gradient is added; autograd then gets none. None, or not given:
    autograd gets it in the weight's dtype, summed in float32."""
    chunk_tokens: int | None
    """Most tokens at once; None, or not given: what suits the device."""
    chunk_columns: int | None
    """Most columns of a tile of logits; None, or not given: what suits the device."""


@dataclass(frozen=True)
class LinearHead:
    """What one call of a head is asked, but for its tensors."""

    shard: VocabShard
    temperature: float
    sequence_parallel: bool
    tile: TileShape

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, labels: Tensor, arguments: HeadArguments) -> "LinearHead":
        """Checked.

        Raises:
            ValueError: shapes, dtypes or sizes that do not fit; before any collective.
        """
        shard = VocabShard(arguments["group"], arguments["vocab_size"], len(weight))
        sequence_parallel = arguments.get("sequence_parallel", False)
        ranks = shard.num_ranks if sequence_parallel else 1
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(f"hidden {tuple(hidden.shape)} must be [T, H] and weight {tuple(weight.shape)} [V/tp, H]")
        if hidden.dtype != weight.dtype:
            raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}; must be the same")
        if labels.shape != (len(hidden) * ranks,):
            raise ValueError(f"labels {tuple(labels.shape)} of {ranks} ranks of {len(hidden)} hidden states each")
        main_grad = arguments.get("main_grad")
        if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != torch.float32):
            raise ValueError(f"main_grad is {main_grad.dtype} {tuple(main_grad.shape)}; must be float32, like weight")
        temperature = arguments.get("temperature", 1.0)
        check_temperature(temperature)
        tile = TileShape.of(weight, len(labels), arguments.get("chunk_tokens"), arguments.get("chunk_columns"))
        return LinearHead(shard, float(temperature), sequence_parallel, tile)


def even_chunks(weight: Tensor, num_tokens: int, elements: dict[str, int]) -> int:
    """Tokens of a chunk whose logits, all columns of them, have at most so many elements, by device; at least 16.

    Chunks are of equal size: a short last one would use the processor badly.
    """
    device = "cuda" if weight.is_cuda else "cpu"
    most = min(MOST_ROWS[device], elements[device] // max(1, len(weight)))
    largest = max(1, most // _KERNEL_ROWS) * _KERNEL_ROWS
    even = math.ceil(num_tokens / max(1, math.ceil(num_tokens / largest)))
    return max(1, min(num_tokens, math.ceil(even / _KERNEL_ROWS) * _KERNEL_ROWS))


def buffers(weight: Tensor, tile: TileShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two buffers of a tile's size, which every tile uses again: fresh memory would cost more than the arithmetic."""
    return tuple(weight.new_empty(2, tile.rows * tile.columns, dtype=dtype).unbind())  # type: ignore[return-value]


def fit(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows x columns elements of a flat buffer, as a matrix without gaps: by rows on CUDA, else by columns.

    A CPU's matrix products of a hundred tokens take three quarters of the time where the tokens lie side by side
    (`tools/bench_log_probs`); those of a few tokens would lose a digit. The Triton kernels want a token's logits side
    by side.
    """
    by_rows = buffer[: rows * columns].view(rows, columns)
    if buffer.is_cuda or rows < _KERNEL_ROWS or triton_kernels.can_run(by_rows):
        return by_rows
    return by_rows.view(columns, rows).t()


def with_formed_gradient(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    *,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    in_main_grad: bool,
) -> Tensor:
    """The loss (a scalar without gradient) as a differentiable function of hidden states and weight.

    Args:
        grad_hidden, grad_weight: its gradients; None where there is none to hand on. Overwritten by a scaling.
        in_main_grad: the weight's gradient is in main_grad already, unscaled: the backward pass must begin with 1.

    Raises:
        RuntimeError: in the backward pass, if it is run twice or, with in_main_grad, begins with another number.
    """
    result: Tensor = _FormedGradient.apply(hidden, weight, loss, (grad_hidden, grad_weight), in_main_grad)
    return result


class _FormedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        gradients: tuple[Tensor | None, Tensor | None],
        in_main_grad: bool,
    ) -> Tensor:
        ctx.gradients, ctx.in_main_grad = gradients, in_main_grad
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients formed in the forward pass are used up: run the backward pass only once")
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.in_main_grad:
            _check_is_one(grad_loss)
        else:
            gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return *gradients, None, None, None


def _check_is_one(grad_loss: Tensor) -> None:
    """The gradient is in main_grad already, unscaled."""
    if grad_loss.is_cuda:
        torch._assert_async(grad_loss == 1)  # without waiting for the device
    elif float(grad_loss) != 1.0:
        raise RuntimeError(f"the loss's gradient is {float(grad_loss)}; with main_grad it must be 1")
