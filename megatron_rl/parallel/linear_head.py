"""What every fused head is asked, checked in one place, and the buffers that its tiles share."""

import math
from dataclasses import dataclass
from typing import Required, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.parallel import triton_kernels
from megatron_rl.parallel.linear_tiles import MOST_ROWS, TileShape
from megatron_rl.parallel.vocab_parallel import check_temperature
from megatron_rl.parallel.vocab_statistics import VocabShard

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
    """[V/tp, H] float32, to which the weight's gradient is added; autograd is then told of none. None, or not given:
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
