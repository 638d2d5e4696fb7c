"""The softmax work of `vocab_statistics` on CUDA, each in one pass over the tile instead of one per operation.

The matrix products stay cuBLAS's; what these kernels add to them is one reading of each tile of logits (forward), and
one reading and one writing (backward). They are taken where Triton is installed and the tensor is on a CUDA device;
TRITON_INTERPRET=1 runs them on CPU tensors too, slowly, for tests.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    _HAS_TRITON = True
except ImportError:
    _HAS_TRITON = False

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_REDUCE_BLOCK, _GRADIENT_BLOCK = 2048, 1024
"""Columns of a program's block."""


def can_run(x: Tensor) -> bool:
    """Whether the kernels take this matrix: float32, bfloat16 or float16, on CUDA, its rows without gaps."""
    return _HAS_TRITON and (x.is_cuda or _INTERPRETED) and x.dtype != torch.float64 and x.stride(1) == 1


def reduce_tile(x: Tensor, column: Tensor, *, temperature: float, entropy: bool, out: Tensor | None) -> Tensor:
    """See `vocab_statistics.reduce_tile`; out=None: the exponentials are not wanted."""
    num_rows, num_columns = x.shape
    statistics = torch.empty(4 if entropy else 3, num_rows, dtype=torch.float32, device=x.device)
    if num_rows > 0:
        target = x if out is None else out
        _reduce_kernel[(num_rows,)](
            x,
            x.stride(0),
            target,
            target.stride(0),
            column,
            statistics,
            num_rows,
            num_columns,
            1.0 / temperature,
            ENTROPY=entropy,
            KEEP=out is not None,
            BLOCK=_REDUCE_BLOCK,
        )
    return statistics


def gradient(
    x: Tensor,
    column: Tensor,
    shift: Tensor,
    offset: Tensor,
    slope: Tensor | None,
    at_label: Tensor,
    *,
    inverse_temperature: float,
    exponentials: bool,
    out: Tensor,
) -> None:
    """See `vocab_statistics.gradient_of_logits` and, with `exponentials`, `gradient_of_exponentials`.

    Args:
        shift: [C]: the maximum, of logits; (m - M) / temperature, of exponentials.
        out: [C, D] of any floating dtype; may be x.
    """
    num_rows, num_columns = x.shape
    if num_rows == 0:
        return
    _gradient_kernel[(num_rows, triton.cdiv(num_columns, _GRADIENT_BLOCK))](
        x,
        x.stride(0),
        out,
        out.stride(0),
        column,
        shift,
        offset,
        offset if slope is None else slope,
        at_label,
        num_columns,
        inverse_temperature,
        SLOPE=slope is not None,
        EXPONENTIALS=exponentials,
        BLOCK=_GRADIENT_BLOCK,
    )


if _HAS_TRITON:
    # Compiled anew for a number of columns of another divisibility by 16, never for another number of tokens.
    @triton.jit(do_not_specialize=["num_rows"])
    def _reduce_kernel(  # type: ignore[no-untyped-def]  # Triton refuses annotations but constexpr
        x_ptr,
        x_stride,
        out_ptr,
        out_stride,
        column_ptr,
        statistics_ptr,
        num_rows,
        num_columns,
        inverse_temperature,
        ENTROPY: tl.constexpr,
        KEEP: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        """One program per row. The sums follow the running maximum, and are shifted where it rises."""
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row * x_stride
        column = tl.load(column_ptr + row)
        owned = (column >= 0) & (column < num_columns)
        # Before the sums, at whose barriers the warps meet: with KEEP, out may be x, and a later warp would read what
        # an earlier one has written.
        target = tl.load(x_ptr + column, mask=owned, other=float("-inf")).to(tl.float32)
        block = tl.arange(0, BLOCK)
        maximum = float("-inf")
        total = 0.0
        moment = 0.0
        for first in range(0, num_columns, BLOCK):
            inside = first + block < num_columns
            x = tl.load(x_ptr + first + block, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(maximum, tl.max(x, axis=0))
            d = tl.where(inside, (x - higher) * inverse_temperature, 0.0)
            e = tl.where(inside, tl.exp(d), 0.0)
            # In the first block maximum is -inf: nothing to shift, and 0 * inf would be nan.
            fall = tl.where(first == 0, 0.0, (maximum - higher) * inverse_temperature)
            scale = tl.exp(fall)
            if ENTROPY:
                moment = (moment + total * fall) * scale + tl.sum(e * d, axis=0)
            total = total * scale + tl.sum(e, axis=0)
            maximum = higher
        tl.store(statistics_ptr + row, maximum)
        tl.store(statistics_ptr + num_rows + row, total)
        tl.store(statistics_ptr + 2 * num_rows + row, target)
        if ENTROPY:
            tl.store(statistics_ptr + 3 * num_rows + row, moment)
        if KEEP:
            out_ptr += row * out_stride
            for first in range(0, num_columns, BLOCK):
                inside = first + block < num_columns
                x = tl.load(x_ptr + first + block, mask=inside, other=float("-inf")).to(tl.float32)
                e = tl.exp((x - maximum) * inverse_temperature)
                tl.store(out_ptr + first + block, e.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _gradient_kernel(  # type: ignore[no-untyped-def]  # Triton refuses annotations but constexpr
        x_ptr,
        x_stride,
        out_ptr,
        out_stride,
        column_ptr,
        shift_ptr,
        offset_ptr,
        slope_ptr,
        at_label_ptr,
        num_columns,
        inverse_temperature,
        SLOPE: tl.constexpr,
        EXPONENTIALS: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        """One program per row and block of columns: exp(d) (offset + slope d) + at_label 1[j = label]."""
        row = tl.program_id(0).to(tl.int64)
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = j < num_columns
        x = tl.load(x_ptr + row * x_stride + j, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + row)
        if EXPONENTIALS:
            # Below the logarithm of any positive number; where x underflowed to 0 it keeps the product 0.
            d = tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), -1e3) + shift
            e = x * tl.exp(shift)
        else:
            d = tl.where(inside, (x - shift) * inverse_temperature, 0.0)
            e = tl.exp(d)
        factor = tl.load(offset_ptr + row)
        if SLOPE:
            factor = factor + tl.load(slope_ptr + row) * d
        g = e * factor
        g += tl.where(j == tl.load(column_ptr + row), tl.load(at_label_ptr + row), 0.0)
        tl.store(out_ptr + row * out_stride + j, g.to(out_ptr.dtype.element_ty), mask=inside)
