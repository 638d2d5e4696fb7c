"""A checkpoint knows no layout: what TP2 saved, PP2, DP2 and one rank go on with, moments included."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_rl.checkpoint import training_state
from megatron_rl.checkpoint.folders import iteration_folder
from megatron_rl.checkpoint.training_state import POLICY, Trained, resume
from megatron_rl.checkpoint.writer import CheckpointWriter
from megatron_rl.config.schema import (
    AlgorithmConfig,
    CriticConfig,
    Dtype,
    LRDecayStyle,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.scalar_model import ActorCritic, Values
from megatron_rl.engine.step import forward_backward
from megatron_rl.objectives.losses import resolve_policy_loss
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.objectives.objectives import PolicyGradientObjective, SupervisedObjective
from megatron_rl.parallel.groups import reduce_metrics
from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks
from tests.distributed.training_ranks import LAYOUTS, recorded_rollouts

NUM_STEPS = 8
VOCAB_SIZE = 259

Stage = tuple[str, bool, int]
"""(layout, whether the optimizer is distributed, step at which it ends)."""


def run_stages(
    rank: int, hf_path: Path, folder: Path, dtype: Dtype, stages: Sequence[Stage], build: type[Policy] = Policy
) -> list[dict[str, float]]:
    """Stage after stage starts from random weights, resumes, trains, and saves; the metrics of all steps."""
    rows = []
    for number, (layout, distributed, end) in enumerate(stages):
        parallel = ParallelConfig(**LAYOUTS[layout][1])
        model = ModelConfig(hf_path=str(hf_path), params_dtype=dtype, load_weights=number == 0)
        groups = initialize(parallel, seed=100 + number)
        policy = build(model, groups, parallel, use_distributed_optimizer=distributed)
        settings = OptimizerConfig(
            lr=1e-3, lr_decay_style=LRDecayStyle.linear, weight_decay=0.1, use_distributed_optimizer=distributed
        )
        models = {POLICY: Trained(policy, Optimizer(settings, policy, num_steps=NUM_STEPS))}
        state = resume(folder, models, say=print) or {"step": 0}
        if state["step"]:  # what was loaded is saved again, for the test to compare
            CheckpointWriter(folder / f"again_{number}", asynchronous=False).save(
                state["step"], training_state.to_save(models, state)
            )
        for step in range(state["step"], end):
            rows.append(train_a_step(models[POLICY], step))
        writer = CheckpointWriter(folder, asynchronous=number % 2 == 0)
        writer.save(end, training_state.to_save(models, {"step": end}))
        writer.finish()
        parallel_state.destroy_model_parallel()
    return rows


def train_a_step(trained: Trained, step: int) -> dict[str, float]:
    sequences = recorded_rollouts()
    for sequence in sequences:
        sequence.per_token["returns"], sequence.per_token["values"] = sequence.loss_mask * 2, sequence.loss_mask * 0
    batch = MiniBatch.of(sequences, range(step, 12), trained.model.groups, micro_batch_tokens=32, pad_to_multiple=2)
    trained.optimizer.zero_grad()
    objective: Any = SupervisedObjective(AlgorithmConfig(), batch.counts, token_sum_norm=1.0)
    extras = [Values()] if isinstance(trained.model, ActorCritic) else []
    if extras:
        algorithm = AlgorithmConfig(critic=CriticConfig(shared=True))
        loss = resolve_policy_loss(algorithm.policy_loss)
        objective = PolicyGradientObjective(
            algorithm, batch.counts, 1.0, policy_loss=loss, on_policy=False, kl_coefficient=0.0
        )
    metrics = forward_backward(trained.model, batch.micro_batches, objective, extras=extras)
    update = trained.optimizer.step()
    row = reduce_metrics(metrics, trained.model.groups.world)
    return row | {"grad_norm": update.grad_norm, "lr": update.lr}


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3", seed=3)


@pytest.fixture(scope="module")
def staying(hf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """NUM_STEPS steps on one rank, without a pause."""
    folder = tmp_path_factory.mktemp("staying")
    (rows,) = run_ranks(run_stages, 1, hf_path, folder, Dtype.float32, [("tp1", True, NUM_STEPS)])
    return rows


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        entries = dist_checkpointing.load_plain_tensors(str(folder))
        return {name: entry for name, entry in entries.items() if isinstance(entry, torch.Tensor)}
    finally:
        dist.destroy_process_group()


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Tensors that are not the same bit for bit; rows that pad the vocabulary, at one layout only, are left out."""
    names = []
    for name, tensor in one.items():
        rows = VOCAB_SIZE if name.endswith("word_embeddings.weight") else len(tensor)
        if not torch.equal(tensor[:rows], other[name][:rows]):
            names.append(name)
    return names


def test_resumed_at_other_layouts_the_curve_is_that_of_staying(
    tmp_path: Path, hf_path: Path, staying: list[dict[str, float]]
) -> None:
    two_ranks = [("tp2", True, 2), ("pp2", True, 4), ("dp2", True, 6)]
    rows, same = run_ranks(run_stages, 2, hf_path, tmp_path, Dtype.float32, two_ranks)
    assert rows == same
    (last,) = run_ranks(run_stages, 1, hf_path, tmp_path, Dtype.float32, [("tp1", True, NUM_STEPS)])
    rows += last
    assert len(rows) == len(staying) == NUM_STEPS
    for row, expected in zip(rows, staying, strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            # float32 sums in another order; without moments the loss of step 3 is off by 1e-3.
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    # What a layout loads it holds bit for bit: written again, every tensor is the same.
    for number, step in ((1, 2), (2, 4)):
        saved = all_tensors(iteration_folder(tmp_path, step))
        again = all_tensors(iteration_folder(tmp_path / f"again_{number}", step))
        assert saved.keys() == again.keys()
        assert sum(name.startswith("optimizer.exp_avg_sq.") for name in saved) == 2 + 8  # layers are one tensor
        assert differing(saved, again) == []


@pytest.mark.slow
def test_a_critic_on_the_backbone_goes_on_at_other_layouts(tmp_path: Path, hf_path: Path) -> None:
    arguments = (hf_path, tmp_path / "staying", Dtype.float32, [("tp1", True, 4)], ActorCritic)
    (staying,) = run_ranks(run_stages, 1, *arguments)
    stages = [("tp2", True, 1), ("pp2", True, 3), ("dp2", True, 4)]
    rows, _ = run_ranks(run_stages, 2, hf_path, tmp_path / "moving", Dtype.float32, stages, ActorCritic)
    for row, expected in zip(rows, staying, strict=True):
        for name in ("policy/loss", "value/loss", "grad_norm"):
            # float32 sums in another order. The value loss is of values that training has moved away from 0.
            np.testing.assert_allclose(row[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    assert len({row["value/loss"] for row in rows}) == 4
    saved = all_tensors(iteration_folder(tmp_path / "moving", 3))
    assert saved["value_head.weight"].any()
    assert differing(saved, all_tensors(iteration_folder(tmp_path / "moving" / "again_2", 3))) == []


@pytest.mark.slow
def test_experts_go_on_at_other_layouts(tmp_path: Path) -> None:
    """Split over ranks whole, by their matrices, or otherwise than the rest of a layer."""
    experts = make_checkpoint(tmp_path / "hf", "qwen3_moe", seed=3, hidden_size=64)
    (expected,) = run_ranks(run_stages, 1, experts, tmp_path / "staying", Dtype.float32, [("tp1", True, NUM_STEPS)])
    stages = [("ep2", True, 2), ("etp2", True, 4), ("tp2_sp_etp1", True, 6), ("ep2", True, NUM_STEPS)]
    for rows in run_ranks(run_stages, 2, experts, tmp_path / "moving", Dtype.float32, stages, timeout_s=200.0):
        for row, wanted in zip(rows, expected, strict=True):
            for name in row:
                np.testing.assert_allclose(row[name], wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, hf_path: Path, dtype: Dtype) -> None:
    """Four ranks, distributed optimizers and replicated ones; in bfloat16 with the float32 copies of the parameters."""
    stages = [
        ("tp2_pp2", True, 1),
        ("dp4", True, 2),
        ("tp2_dp2", False, 3),
        ("pp2_dp2", True, 4),
        ("tp2_sp", False, 5),
    ]
    run_ranks(run_stages, 4, hf_path, tmp_path, dtype, stages, timeout_s=300.0)
    for number in range(1, len(stages)):
        saved = all_tensors(iteration_folder(tmp_path, number))
        again = all_tensors(iteration_folder(tmp_path / f"again_{number}", number))
        assert saved.keys() == again.keys()
        assert any(name.startswith("optimizer.main.") for name in saved) == (dtype is Dtype.bfloat16)
        assert differing(saved, again) == []
