"""What only trades time for memory changes nothing: recomputation, and sharing out the optimizer's state."""

from pathlib import Path
from typing import Any

import torch

from megatron_rl.config.schema import Dtype, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_backward
from megatron_rl.trainer.minibatch import MiniBatch
from tests.checkpoints import make_checkpoint
from tests.distributed.layout_matrix import Case, leave, objective_of, sequences_of, step_at
from tests.distributed.spawn import run_ranks

# The contract's bound. Recomputed activations are the same numbers; a shared-out optimizer adds up in another order.
RELATIVE = 1e-6
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"context_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
]


def with_recomputation(rank: int, folder: Path) -> list[float]:
    """Largest difference of a gradient tensor, by its norm, at each layout and kind of recomputation."""
    errors = [0.0]
    for layout in LAYOUTS:
        _, expected = step_at(folder, Case(layout, 24, "grpo"))
        for model in ({"recompute_granularity": "selective"}, FULL):
            _, found = step_at(folder, Case(layout, 24, "grpo", tuple(model.items())))
            assert found.keys() == expected.keys()
            errors += [float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected]
    return errors


def weights_after_steps(rank: int, folder: Path, layout: dict[str, Any], distributed: bool) -> dict[str, torch.Tensor]:
    """This rank's weights after three steps of Adam."""
    parallel = ParallelConfig(**layout)
    groups = initialize(parallel, seed=1)
    settings = ModelConfig(hf_path=str(folder), params_dtype=Dtype.float32)
    policy = Policy(settings, groups, parallel, use_distributed_optimizer=distributed)
    # An epsilon of the gradients' own size: Adam divides by their roots, which makes a sign of what cancels to nothing.
    optimizer = Optimizer(
        OptimizerConfig(lr=1e-3, adam_eps=1e-3, use_distributed_optimizer=distributed), policy, num_steps=3
    )
    sequences = sequences_of("grpo")
    for _ in range(3):
        batch = MiniBatch.of(
            sequences, range(12), groups, micro_batch_tokens=24, pad_to_multiple=1, num_rows_multiple=groups.pp.size()
        )
        optimizer.zero_grad()
        forward_backward(policy, batch.rows, objective_of("grpo", batch))
        assert optimizer.step().finite
    weights = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    leave()
    return weights


def with_shared_optimizer(rank: int, folder: Path) -> list[float]:
    """Largest difference of a weight, by its tensor's norm, at each layout."""
    errors = []
    for layout in LAYOUTS:
        alone, shared = (weights_after_steps(rank, folder, layout, distributed) for distributed in (False, True))
        errors += [float((shared[name] - alone[name]).norm() / alone[name].norm()) for name in alone]
    return errors


def both(rank: int, folder: Path) -> tuple[float, float]:
    return max(with_recomputation(rank, folder)), max(with_shared_optimizer(rank, folder))


def test_they_change_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "hf", "qwen3", seed=3, hidden_size=64, intermediate_size=96, num_hidden_layers=4
    )
    for recomputed, shared in run_ranks(both, 2, folder, timeout_s=300.0):
        assert recomputed <= RELATIVE
        assert shared <= RELATIVE
