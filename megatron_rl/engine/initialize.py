"""Join the training ranks: process groups, Megatron's parallel state, seeds."""

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.device import HAS_CUDA, distributed_backend, this_device
from megatron_rl.models.groups import megatron_groups
from megatron_rl.parallel.groups import Groups


def initialize(parallel: ParallelConfig, *, seed: int) -> Groups:
    """Join this process to the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Args:
        parallel: layout; it must divide WORLD_SIZE (validated before).
        seed: of initial weights and dropout; data-parallel replicas share it.
    """
    if HAS_CUDA:
        torch.cuda.set_device(this_device())
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if not dist.is_initialized():
        dist.init_process_group(
            distributed_backend(),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return megatron_groups()


def finalize() -> None:
    """Leave the world."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
