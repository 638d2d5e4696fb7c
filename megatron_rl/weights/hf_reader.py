"""Hugging Face checkpoints, read by slice: every rank maps the files and copies what it holds, and nothing else."""

from torch import Tensor

from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.weights.fp8_parameters import fillable
from megatron_rl.weights.hf_checkpoint_files import HFCheckpointFiles
from megatron_rl.weights.runs import runs_of_shard
from megatron_rl.weights.unpacking import copy_run


class HFCheckpointReader(HFCheckpointFiles):
    """The tensors of a checkpoint folder."""

    def read_shard(self, tensor_map: TensorMap, rank: int, size: int, into: Tensor) -> None:
        """Fill the Megatron shard of `rank` of `size` from its slices; the padded vocabulary is zero."""
        with fillable(into) as target:
            for piece in runs_of_shard(tensor_map, rank, size, target):
                if piece.run.hf_name is None:
                    piece.shard.zero_()
                    continue
                form = self.form(piece.run.hf_name)
                assert form is not None, f"{piece.run.hf_name}: not checked before it is read"
                copy_run(form, tensor_map, piece.run, piece.shard)
