"""Megatron's process groups as the value that everything here takes as an argument."""

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rl.parallel.groups import Groups


def megatron_groups() -> Groups:
    """This rank's groups, of the layout that `parallel_state.initialize_model_parallel` was given."""
    world = dist.group.WORLD
    assert world is not None
    return Groups(
        world=world,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
    )
