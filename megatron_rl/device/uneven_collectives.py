"""Gather and reduce-scatter of unequal parts over gloo, which only knows equal ones.

Core exchanges the tokens of experts between ranks that hold different numbers of them, when experts are split over
tensor-parallel ranks of their own. NCCL does it; on a CPU these two stand in for core's functions of the same names.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_unequal(part: Tensor, group: ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """[sizes[rank], ...] of every rank -> [sum(sizes), ...], in rank order; parts travel filled up to the largest."""
    longest = max(sizes)
    sent = part.new_zeros(longest, *part.shape[1:])
    sent[: len(part)] = part
    gathered = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(gathered, sent, group=group)
    return torch.cat([whole[:size] for whole, size in zip(gathered, sizes, strict=True)])


def reduce_scatter_unequal(whole: Tensor, group: ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """[sum(sizes), ...] of every rank -> the sum over the ranks, of which each keeps its [sizes[rank], ...]."""
    total = whole.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total.split(list(sizes))[group.rank()].clone()


def prepare_uneven_collectives() -> None:
    """Let core's functions fall back on those above where parts are unequal."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(input_: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        return gather_unequal(input_, group, [int(size) for size in output_split_sizes])

    def scatter_any(input_: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        return reduce_scatter_unequal(input_, group, [int(size) for size in input_split_sizes])

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, scatter_any
