"""Join the training ranks: process groups, Megatron's parallel state, seeds."""

import os
import random
import resource
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.device import HAS_CUDA, distributed_backend, this_device
from megatron_rl.models.groups import megatron_groups
from megatron_rl.parallel.groups import Groups


def _check_local_rank(local_rank: int, num_devices: int) -> None:
    """Raise UserError if a rank cannot have the GPU of its number."""
    if local_rank >= num_devices:
        raise UserError(
            f"LOCAL_RANK: given {local_rank}, allowed: below {num_devices}, the GPUs that this rank sees; "
            "every task must see all GPUs of its node (no --gpus-per-task, no --gpu-bind)"
        )


def _prepare_sockets() -> None:
    """Let gloo connect two ranks when they first talk, and this process have as many connections as the system allows.

    Every group has gloo beside NCCL, and gloo would connect all pairs of each group at once: thousands of sockets per
    rank at 512 ranks, where 1,024 files are the usual soft limit.
    """
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def initialize(parallel: ParallelConfig, *, seed: int) -> Groups:
    """Join this process to the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Args:
        parallel: layout; it must divide WORLD_SIZE (validated before).
        seed: of initial weights and dropout; data-parallel replicas share it.
    """
    if HAS_CUDA:
        _check_local_rank(this_device().index, torch.cuda.device_count())
        torch.cuda.set_device(this_device())
        # A collective that hangs on a GPU hangs no Python frame: NCCL's recorder then tells which rank lacks which.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    _prepare_sockets()
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
