"""Routing replay, auxiliary losses and the aux-free bias, at layouts that split rows and experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.algorithms.metrics import Metric
from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
from megatron_rl.data.packing import PackedRow, pack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_backward, forward_log_probs
from tests.checkpoints import make_checkpoint
from tests.distributed.layout_matrix import leave, whole_gradients
from tests.distributed.spawn import run_ranks

EXPERTS, TOPK, LAYERS = 4, 2, 2
COEFFICIENT = 0.05
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", seed=3, hidden_size=64)


def build(checkpoint: Path, layout: dict[str, Any], **model: Any) -> Policy:
    parallel = ParallelConfig(**layout)
    groups = initialize(parallel, seed=1)
    settings = ModelConfig(hf_path=str(checkpoint), params_dtype=Dtype.float32, **model)
    return Policy(settings, groups, parallel, use_distributed_optimizer=False)


def row_of(lengths: list[int], seed: int) -> PackedRow:
    """Lengths in multiples of 4 are not padded by context parallelism of 2, which would count in auxiliary losses."""
    rng = np.random.default_rng(seed)
    sequences = [TrainingSequence(rng.integers(3, 259, n + 1), np.ones(n, dtype=np.float32)) for n in lengths]
    return pack(sequences, range(len(lengths)), pad_to_multiple=1)


def chosen(policy: Policy) -> tuple[list[torch.Tensor], list[Any]]:
    """Where routers put [tokens, experts] of their choices from now on, and the hooks."""
    maps: list[torch.Tensor] = []
    routers = [m for gpt in policy.models for m in gpt.modules() if isinstance(m, TopKRouter)]
    return maps, [r.register_forward_hook(lambda module, given, out: maps.append(out[1].clone())) for r in routers]


def replay(rank: int, checkpoint: Path, layout: dict[str, Any]) -> tuple[int, int, int]:
    """(choices, those that differ from the record in a replay, those that differ without), after the weights moved."""
    policy = build(checkpoint, layout, moe_routing_replay=True)
    rows = [row_of([7, 3], 1), row_of([5], 2)]
    with policy.routing.recording():
        before = forward_log_probs(policy, rows)
    recorded = [
        torch.zeros(len(indices), EXPERTS, dtype=torch.bool).scatter(1, indices.long(), True)
        for of_row in policy.routing.routes()
        for indices in of_row
    ]
    with policy.routing.replaying():
        again = forward_log_probs(policy, rows)
    for (one, _), (other, _) in zip(before, again, strict=True):
        assert torch.equal(one, other)  # the weights have not moved, so neither have the choices
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            if name.endswith("router.weight"):  # equal on all ranks
                parameter.mul_(1 + 0.5 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)))
    maps, _ = chosen(policy)

    def loss(log_probs: torch.Tensor, entropy: torch.Tensor, row: PackedRow) -> tuple[torch.Tensor, dict[str, Metric]]:
        return log_probs.sum(), {}

    with policy.routing.replaying():
        forward_backward(policy, rows, loss)
    differ = sum(int((a != b).any(1).sum()) for a, b in zip(maps, recorded, strict=True))
    maps.clear()
    forward_log_probs(policy, rows)
    moved = sum(int((a != b).any(1).sum()) for a, b in zip(maps, recorded, strict=True))
    leave()
    return sum(len(one) for one in recorded), differ, moved


@pytest.mark.parametrize("layout", ["cp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_routes_are_replayed(checkpoint: Path, layout: str) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    for choices, differ, moved in run_ranks(replay, num_ranks, checkpoint, parallel):
        assert choices > 0
        assert differ == 0
        assert moved > 0  # so that the replay had something to do


def auxiliary_gradients(rank: int, checkpoint: Path, names: list[str]) -> list[torch.Tensor]:
    """Gradient of the auxiliary loss alone in the last router's weight, at layouts, and with the row twice."""
    results = []
    for name in names:
        policy = build(
            checkpoint,
            LAYOUTS[name.removesuffix("_twice")][1],
            transformer_config={"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": COEFFICIENT},
        )
        rows = [row_of([8, 4], 1)] * (2 if name.endswith("_twice") else 1)
        forward_backward(policy, rows, lambda log_probs, entropy, row: (0.0 * log_probs.sum(), {}))
        gradients = whole_gradients(policy)
        results.append(gradients.get(f"model.layers.{LAYERS - 1}.mlp.gate.weight", torch.zeros(0)))
        leave()
    return results


def expected_auxiliary_gradient(rank: int, checkpoint: Path) -> torch.Tensor:
    """By the definition: E * coefficient * sum_i f_i P_i, f_i the part of the choices that expert i got, P_i its mean
    probability (Switch Transformer, arXiv:2101.03961, eq. 4; f_i over the choices, as Megatron counts)."""
    policy = build(checkpoint, {})
    (router,) = [m for m in policy.models[0].decoder.layers[-1].modules() if isinstance(m, TopKRouter)]
    inputs: list[torch.Tensor] = []
    router.register_forward_hook(lambda module, given, out: inputs.append(given[0]))
    forward_log_probs(policy, [row_of([8, 4], 1)])
    weight = router.weight.detach().double().requires_grad_()
    probabilities = (inputs[0].flatten(0, 1).double() @ weight.T).softmax(-1)
    counts = torch.bincount(probabilities.topk(TOPK).indices.flatten(), minlength=EXPERTS)
    part = counts / counts.sum()
    (COEFFICIENT * EXPERTS * (part * probabilities.mean(0)).sum()).backward()
    assert weight.grad is not None
    return weight.grad


def test_auxiliary_losses_do_not_depend_on_the_layout(checkpoint: Path) -> None:
    (exact,) = run_ranks(expected_auxiliary_gradient, 1, checkpoint)
    for num_ranks, names in ((1, ["one", "one_twice"]), (2, ["cp2", "tp2_sp", "pp2", "ep2"])):
        for name, found in zip(names, run_ranks(auxiliary_gradients, num_ranks, checkpoint, names)[0], strict=True):
            # float32 against float64, a sum over 12 tokens. A wrong scale would be off by a half or more.
            error = float((found.double() - exact).norm() / exact.norm())
            assert error < 1e-5, f"{name}: {error}"
