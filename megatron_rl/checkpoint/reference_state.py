"""A reference policy that moves, in a checkpoint: its weights under `reference.`, split as the policy's are.

A fixed one is not stored: it is the checkpoint that the run started from. Like the optimizer's moments, the weights are
tensors of the model for core, so a run can go on at another layout.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from megatron_rl.checkpoint.folders import iteration_folder
from megatron_rl.checkpoint.integrity import loading
from megatron_rl.engine.reference import ReferenceWeights

KEY = "reference"


def to_save(reference: ReferenceWeights) -> dict[str, Any]:
    """Core's description of every weight, to be added to the state that is saved."""
    entries: dict[int, ShardedTensor | ShardedTensorFactory] = {}
    for chunk in reference.policy.chunks:
        model = getattr(chunk, "module", chunk).sharded_state_dict()
        for entry in nested_values(model):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data is not None:
                entries[entry.data.data_ptr()] = entry
    return {
        KEY: {
            name: make_sharded_optimizer_tensor(entries[parameter.data_ptr()], reference.weights[name], prefix=KEY)
            for name, parameter in reference.parameters().items()
        }
    }


@torch.no_grad()
def load(checkpoints: Path, step: int, reference: ReferenceWeights) -> None:
    """Restore the weights of the checkpoint after `step` steps; collective over all ranks.

    Raises:
        CheckpointError: files are missing or damaged, or the run had no reference that moves.
    """
    folder = iteration_folder(checkpoints, step)
    with loading(folder):
        loaded = dist_checkpointing.load(to_save(reference), str(folder))[KEY]
    for name, weight in loaded.items():
        reference.weights[name].copy_(weight)
