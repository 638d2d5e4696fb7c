"""The random generators of a rank, in a checkpoint.

At the layout that saved them every rank gets its own back. At another layout there is no such thing as the same rank:
each then takes the Python, NumPy and torch generators of the rank 0 that was, and the streams of core's dropout, which
differ between tensor-parallel ranks, begin anew from the run's seed. Data order and sampling do not depend on any
generator: they are functions of the seed and the position in the data.
"""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_rl.device import HAS_CUDA

_KEY = "rng_state"


def to_save() -> ShardedObject:
    """This rank's generators."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if HAS_CUDA else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(_KEY, state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def to_load(*, saved_world_size: int, same_layout: bool) -> ShardedObject:
    """What this rank loads: its own, or those of the rank 0 that was."""
    return ShardedObject(_KEY, None, (saved_world_size,), (dist.get_rank() if same_layout else 0,), replica_id=0)


def restore(state: dict[str, Any], *, same_layout: bool) -> None:
    """Set the generators to a loaded state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if not same_layout:
        return
    if HAS_CUDA:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
