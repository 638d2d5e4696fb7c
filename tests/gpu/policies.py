"""Policies of the GPU tests, and their log-probs of recorded sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
from megatron_rl.data.packing import pack, unpack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_log_probs

SEQUENCES = [np.random.default_rng(n).integers(3, 259, size=n).tolist() for n in (2, 9, 30, 41, 17)]


def build(checkpoint: Path, groups: Any, dtype: Dtype = Dtype.bfloat16, **model: Any) -> Policy:
    """A policy on this GPU."""
    return Policy(ModelConfig(hf_path=str(checkpoint), params_dtype=dtype, **model), groups, ParallelConfig())


def log_probs(policy: Policy, multiple: int = 1) -> Tensor:
    """Of every token of `SEQUENCES` but the first of each, from one micro-batch; float32 on the host."""
    sequences = [TrainingSequence(np.array(s), np.ones(len(s) - 1, dtype=np.float32)) for s in SEQUENCES]
    micro_batch = pack(sequences, range(len(sequences)), pad_to_multiple=multiple)
    return torch.cat(unpack(forward_log_probs(policy, [micro_batch])[0][0], micro_batch))
