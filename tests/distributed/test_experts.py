"""Routing replay, auxiliary losses and the aux-free bias, at layouts that split micro-batches and experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.algorithms.metrics import Metric
from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
from megatron_rl.data.packing import MicroBatch, pack
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
    "dp2": (2, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "etp2": (2, {"expert_tensor_parallel_size": 2}),
    "tp2_etp1": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1}),
    "tp2_pp2_sp": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
    "tp2_cp2_sp": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}),
}
BIAS_RATE = 0.01


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe", seed=3, hidden_size=64)


def build(checkpoint: Path, layout: dict[str, Any], **model: Any) -> Policy:
    parallel = ParallelConfig(**layout)
    groups = initialize(parallel, seed=1)
    settings = ModelConfig(hf_path=str(checkpoint), params_dtype=Dtype.float32, **model)
    return Policy(settings, groups, parallel, use_distributed_optimizer=False)


def micro_batch_of(lengths: list[int], seed: int) -> MicroBatch:
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
    micro_batches = [micro_batch_of([7, 3], 1), micro_batch_of([5], 2)]
    with policy.routing.recording():
        before = forward_log_probs(policy, micro_batches)
    recorded = [
        torch.zeros(len(indices), EXPERTS, dtype=torch.bool).scatter(1, indices.long(), True)
        for of_micro_batch in policy.routing.routes()
        for indices in of_micro_batch
    ]
    with policy.routing.replaying():
        again = forward_log_probs(policy, micro_batches)
    for (one, _), (other, _) in zip(before, again, strict=True):
        assert torch.equal(one, other)  # the weights have not moved, so neither have the choices
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            if name.endswith("router.weight"):  # equal on all ranks
                parameter.mul_(1 + 0.5 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)))
    maps, _ = chosen(policy)

    def loss(
        log_probs: torch.Tensor, entropy: torch.Tensor, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, dict[str, Metric]]:
        return log_probs.sum(), {}

    with policy.routing.replaying():
        forward_backward(policy, micro_batches, loss)
    differ = sum(int((a != b).any(1).sum()) for a, b in zip(maps, recorded, strict=True))
    maps.clear()
    forward_log_probs(policy, micro_batches)
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


def balancing_micro_batches(name: str, rank: int) -> list[MicroBatch]:
    """Lengths that every split must fill up; with `_empty` a rank has no work, with `_twice` the micro-batch twice."""
    micro_batch = micro_batch_of([7, 3], 1)
    if name.endswith("_empty") and rank == 1:
        return [pack([], [], pad_to_multiple=1)]
    return [micro_batch] * (2 if name.endswith("_twice") else 1)


def auxiliary_gradients(rank: int, checkpoint: Path, names: list[str]) -> list[torch.Tensor]:
    """Gradient of the auxiliary losses alone in the last router's weight, at layouts."""
    results = []
    for name in names:
        policy = build(
            checkpoint,
            LAYOUTS[name.removesuffix("_twice").removesuffix("_empty")][1],
            transformer_config={
                "moe_router_load_balancing_type": "aux_loss",
                "moe_aux_loss_coeff": COEFFICIENT,
                "moe_z_loss_coeff": COEFFICIENT,
            },
        )
        micro_batches = balancing_micro_batches(name, rank)
        forward_backward(policy, micro_batches, lambda log_probs, entropy, micro_batch: (0.0 * log_probs.sum(), {}))
        gradients = whole_gradients(policy)
        results.append(gradients.get(f"model.layers.{LAYERS - 1}.mlp.gate.weight", torch.zeros(0)))
        leave()
    return results


def expected_auxiliary_gradient(rank: int, checkpoint: Path) -> torch.Tensor:
    """By the definitions: E * coefficient * sum_i f_i P_i, f_i the part of the choices that expert i got, P_i its mean
    probability (Switch Transformer, arXiv:2101.03961, eq. 4; f_i over the choices, as Megatron counts); and
    coefficient * mean of the squared log-sum-exp of a token's logits (ST-MoE, arXiv:2202.08906, eq. 5)."""
    policy = build(checkpoint, {})
    (router,) = [m for m in policy.models[0].decoder.layers[-1].modules() if isinstance(m, TopKRouter)]
    inputs: list[torch.Tensor] = []
    router.register_forward_hook(lambda module, given, out: inputs.append(given[0]))
    forward_log_probs(policy, balancing_micro_batches("one", rank))
    weight = router.weight.detach().double().requires_grad_()
    logits = inputs[0].flatten(0, 1).double() @ weight.T
    probabilities = logits.softmax(-1)
    counts = torch.bincount(probabilities.topk(TOPK).indices.flatten(), minlength=EXPERTS)
    part = counts / counts.sum()
    balance = EXPERTS * (part * probabilities.mean(0)).sum()
    (COEFFICIENT * (balance + logits.logsumexp(-1).square().mean())).backward()
    assert weight.grad is not None
    return weight.grad


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> torch.Tensor:
    (gradient,) = run_ranks(expected_auxiliary_gradient, 1, checkpoint)
    assert isinstance(gradient, torch.Tensor)
    return gradient


FOUR_RANKS = pytest.param(4, ["tp2_pp2_sp", "tp2_cp2_sp"], marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("num_ranks", "names"),
    [
        pytest.param(1, ["one", "one_twice"], marks=pytest.mark.slow),
        (2, ["cp2", "tp2_sp", "pp2", "ep2", "dp2_empty", "ep2_empty", "cp2_twice"]),
        FOUR_RANKS,
    ],
)
def test_auxiliary_losses_do_not_depend_on_the_layout(
    checkpoint: Path, exact: torch.Tensor, num_ranks: int, names: list[str]
) -> None:
    for name, found in zip(names, run_ranks(auxiliary_gradients, num_ranks, checkpoint, names)[0], strict=True):
        # float32 against float64, a sum over 10 tokens. A wrong scale would be off by a tenth or more.
        error = float((found.double() - exact).norm() / exact.norm())
        assert error < 1e-5, f"{name}: {error}"


def moved_biases(rank: int, folder: Path, names: list[str]) -> list[dict[str, torch.Tensor]]:
    """How far the biases of this rank's routers moved in a step of two micro-batches, at layouts."""
    results = []
    for name in names:
        layout = LAYOUTS[name.removesuffix("_empty")][1]
        policy = build(folder, layout, transformer_config={"moe_router_bias_update_rate": BIAS_RATE})
        before = {n: p.clone() for n, p in policy.parameters.items() if n.endswith("expert_bias")}
        micro_batches = balancing_micro_batches(name, rank) * 2
        forward_log_probs(policy, micro_batches)  # passes without gradient do not count
        forward_backward(policy, micro_batches, lambda log_probs, entropy, micro_batch: (log_probs.sum(), {}))
        results.append({n: policy.parameters[n] - bias for n, bias in before.items()})
        leave()
    return results


def expected_moves(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """rate * sign(mean - count), by what the routers chose (Wang et al. 2024, arXiv:2408.15664, algorithm 1)."""
    policy = build(folder, {})
    maps, _ = chosen(policy)
    forward_log_probs(policy, balancing_micro_batches("one", rank))
    names = [n for n in policy.parameters if n.endswith("expert_bias")]
    counts = [one.sum(0).float() for one in maps]
    return {name: BIAS_RATE * (c.mean() - c).sign() for name, c in zip(names, counts, strict=True)}


@pytest.mark.parametrize(
    ("num_ranks", "names"),
    [
        pytest.param(1, ["one"], marks=pytest.mark.slow),
        (2, ["cp2", "tp2_sp", "pp2", "dp2_empty"]),
        FOUR_RANKS,
    ],
)
def test_the_bias_of_experts_moves_alike(tmp_path: Path, num_ranks: int, names: list[str]) -> None:
    folder = make_checkpoint(tmp_path / "hf", "deepseek_v3", seed=3, hidden_size=64)
    (expected,) = run_ranks(expected_moves, 1, folder)
    assert expected
    assert all(float(move.abs().max()) > 0 for move in expected.values())
    for of_rank in run_ranks(moved_biases, num_ranks, folder, names, timeout_s=200.0):
        for name, moves in zip(names, of_rank, strict=True):
            assert name.startswith(("pp2", "tp2_pp2")) or moves.keys() == expected.keys()
            for parameter, move in moves.items():
                # The bias is of the size of 1, and float32 rounds it at 1e-7.
                torch.testing.assert_close(move, expected[parameter], rtol=0, atol=1e-6, msg=f"{name} {parameter}")
