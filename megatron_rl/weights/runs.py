"""The runs of a table as views of tensors, for whoever moves them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_rl.models.tensor_map import Run, TensorMap


def matrix(tensor_map: TensorMap, hf_tensor: Tensor) -> Tensor:
    """View of a whole Hugging Face tensor, as stored, whose rows along `tensor_map.dim` the runs count."""
    view = hf_tensor if tensor_map.index is None else hf_tensor[tensor_map.index]
    return view.t() if tensor_map.transposed else view


def rows(view: Tensor, dim: int, run: Run) -> Tensor:
    """View of the run's rows of a matrix."""
    index = slice(run.start, run.start + (run.size - 1) * run.step + 1, run.step)
    return view[(slice(None),) * dim + (index,)]


@dataclass(frozen=True)
class RunOfShard:
    """A run, and the part of a shard that it fills."""

    run: Run
    shard: Tensor


def runs_of_shard(tensor_map: TensorMap, rank: int, size: int, shard: Tensor) -> Iterator[RunOfShard]:
    """The shard of rank `rank` of `size`, cut into views of its runs."""
    offset = 0
    for run in tensor_map.runs(rank, size):
        yield RunOfShard(run, shard.narrow(tensor_map.dim, offset, run.size))
        offset += run.size
