"""Losses of supervised steps on recorded sequences; `python -m tests.gpu.curve CHECKPOINT` prints those of float32.

Started with CUDA_VISIBLE_DEVICES empty, that is the curve of a machine without a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.config.schema import (
    AdamImplementation,
    AlgorithmConfig,
    Dtype,
    LayerSpec,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_rl.device import distributed_backend
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.step import forward_backward
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.objectives.objectives import SupervisedObjective
from tests.distributed.training_ranks import recorded_rollouts
from tests.gpu.policies import build

NUM_STEPS = 20


def curve(checkpoint: Path, groups: Any, dtype: Dtype, adam: AdamImplementation, **model: Any) -> list[float]:
    """Losses of `NUM_STEPS` steps, each on all sequences."""
    policy = build(checkpoint, groups, dtype, **model)
    # Updates above the steps of bfloat16 at the size of the weights, about 5e-4: smaller ones would be rounded away.
    optimizer = Optimizer(OptimizerConfig(lr=1e-3, implementation=adam), policy, num_steps=NUM_STEPS)
    sequences = recorded_rollouts()
    batch = MiniBatch.of(
        sequences, range(len(sequences)), groups, micro_batch_tokens=256, pad_to_multiple=policy.token_multiple
    )
    objective = SupervisedObjective(AlgorithmConfig(), batch.counts, token_sum_norm=16.0)
    losses = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        losses.append(forward_backward(policy, batch.micro_batches, objective)["sft/loss"].value)
        assert optimizer.step().finite
    return losses


def curve_of_the_host(checkpoint: Path) -> list[float]:
    """The curve of float32 in a process that sees no GPU."""
    command = [sys.executable, "-m", "tests.gpu.curve", str(checkpoint)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    losses: list[float] = json.loads(ended.stdout.strip().splitlines()[-1])
    assert losses[-1] < 0.8 * losses[0], "something was learned"
    return losses


if __name__ == "__main__":
    dist.init_process_group(distributed_backend(), store=dist.HashStore(), rank=0, world_size=1)
    alone = initialize(ParallelConfig(), seed=0)
    losses = curve(Path(sys.argv[1]), alone, Dtype.float32, AdamImplementation.torch, layer_spec=LayerSpec.portable)
    print(json.dumps(losses))
