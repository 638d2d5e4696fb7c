"""What only trades time for memory changes nothing: recomputation, the optimizer's state shared out, tied weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.config.schema import Dtype, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_backward
from megatron_rl.objectives.minibatch import MiniBatch
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
EXPERTS = [{"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}]


def with_recomputation(rank: int, folder: Path, layouts: list[dict[str, Any]]) -> list[float]:
    """Largest difference of a gradient tensor, by its norm, at each layout and kind of recomputation."""
    errors = [0.0]
    for layout in layouts:
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
            sequences,
            range(12),
            groups,
            micro_batch_tokens=24,
            pad_to_multiple=1,
            num_micro_batches_multiple=groups.pp.size(),
        )
        optimizer.zero_grad()
        forward_backward(policy, batch.micro_batches, objective_of("grpo", batch))
        assert optimizer.step().finite
    weights = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    leave()
    return weights


def with_shared_optimizer(rank: int, folder: Path, layouts: list[dict[str, Any]]) -> list[float]:
    """Largest difference of a weight, by its tensor's norm, at each layout."""
    errors = []
    for layout in layouts:
        alone, shared = (weights_after_steps(rank, folder, layout, distributed) for distributed in (False, True))
        errors += [float((shared[name] - alone[name]).norm() / alone[name].norm()) for name in alone]
    return errors


def both(rank: int, folder: Path, layouts: list[dict[str, Any]]) -> tuple[float, float]:
    return max(with_recomputation(rank, folder, layouts)), max(with_shared_optimizer(rank, folder, layouts))


@pytest.mark.parametrize(
    ("family", "layouts"), [("qwen3", LAYOUTS), pytest.param("qwen3_moe", EXPERTS, marks=pytest.mark.slow)]
)
def test_they_change_nothing(tmp_path: Path, family: str, layouts: list[dict[str, Any]]) -> None:
    folder = make_checkpoint(tmp_path / "hf", family, seed=3, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    for recomputed, shared in run_ranks(both, 2, folder, layouts, timeout_s=300.0):
        assert recomputed <= RELATIVE
        assert shared <= RELATIVE


def with_own_output_layer(tied: Path, untied: Path) -> None:
    """Write a checkpoint whose output layer is a copy of the embedding that another one ties to it."""
    untied.mkdir()
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))


def tied_and_not(rank: int, tied: Path, untied: Path) -> list[float]:
    """Largest differences of a metric and of a gradient at each layout; a tied weight's gradient is the sum of both."""
    errors = [0.0]
    for layout in LAYOUTS:
        metrics, gradients = step_at(tied, Case(layout, 24, "grpo"))
        own_metrics, own = step_at(untied, Case(layout, 24, "grpo"))
        if rank == 0:
            own["model.embed_tokens.weight"] = own["model.embed_tokens.weight"] + own.pop("lm_head.weight")
            assert own.keys() == gradients.keys()
        # Of two weights the norm is another.
        names = own_metrics.keys() - {"optim/grad_norm"}
        errors += [abs(own_metrics[name] - metrics[name]) / max(abs(metrics[name]), 1e-3) for name in names]
        errors += [float((own[name] - gradients[name]).norm() / gradients[name].norm()) for name in gradients]
    return errors


def test_tied_embeddings_change_nothing(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied", "qwen3", seed=3, hidden_size=64, num_hidden_layers=4)
    with_own_output_layer(tied, tmp_path / "untied")
    for errors in run_ranks(tied_and_not, 2, tied, tmp_path / "untied", timeout_s=200.0):
        assert max(errors) <= RELATIVE
