"""Memory that training gives up while engines generate: it is really free, and no number of a run changes for it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks
from tests.e2e.runs import Run, reference, repeatable


def steps_in_rank(rank: int, checkpoint: Path, offloads: bool) -> dict[str, Any]:
    """Three supervised steps, between which the memory is given up and taken back."""
    from megatron_rl.config.schema import AlgorithmConfig, OptimizerConfig
    from megatron_rl.engine.optimizer import Optimizer, TrainingMemory
    from megatron_rl.engine.step import forward_backward
    from megatron_rl.objectives.minibatch import MiniBatch
    from megatron_rl.objectives.objectives import SupervisedObjective
    from tests.distributed.training_ranks import recorded_rollouts, start_policy

    policy = start_policy(checkpoint, "tp1")
    optimizer = Optimizer(OptimizerConfig(lr=1e-2), policy, num_steps=3)
    memory = TrainingMemory(optimizer)
    sequences = recorded_rollouts()
    norms, held = [], []
    for _ in range(3):
        batch = MiniBatch.of(
            sequences,
            range(len(sequences)),
            policy.groups,
            micro_batch_tokens=64,
            pad_to_multiple=1,
            num_micro_batches_multiple=1,
        )
        objective = SupervisedObjective(AlgorithmConfig(), batch.counts, token_sum_norm=1.0)
        optimizer.zero_grad()
        forward_backward(policy, batch.micro_batches, objective, temperature=1.0)
        norms.append(optimizer.step().grad_norm)
        if offloads:
            memory.free()
            memory.free()
            held.append(gradient_bytes(policy))
            memory.take_back()
            memory.take_back()
    held.append(gradient_bytes(policy))
    return {"norms": norms, "held": held, "weights": {n: p.detach().clone() for n, p in policy.parameters.items()}}


def gradient_bytes(policy: Any) -> int:
    buffers = [buffer for chunk in policy.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)


def test_gradients_give_up_their_memory_and_steps_stay_the_same(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", 1)
    (plain,), (offloaded,) = (run_ranks(steps_in_rank, 1, checkpoint, offloads) for offloads in (False, True))
    assert offloaded["norms"] == plain["norms"]
    assert all(torch.equal(offloaded["weights"][name], tensor) for name, tensor in plain["weights"].items())
    parameters = sum(tensor.nbytes for tensor in plain["weights"].values())
    assert plain["held"][-1] >= parameters
    assert offloaded["held"] == [0, 0, 0, plain["held"][-1]]


@pytest.mark.slow
def test_a_run_that_offloads_is_the_same_run(tmp_path: Path) -> None:
    """Checkpoints in the middle of it are written while the memory is given up."""
    run = Run(tmp_path, rollout={"offload_training": True}).succeed()
    assert repeatable(run.rows) == repeatable(reference().rows)
    assert run.exported_bytes == reference().exported_bytes
