"""What `plan` says of a rank's memory, against what training allocates there."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.config.hf_checkpoint import read_json_object
from megatron_rl.config.schema import Config, Dtype, LayerSpec, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.data.packing import pack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_backward
from megatron_rl.models.sizes import model_sizes
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.placement.layout import layout_of
from megatron_rl.placement.plan import plan
from tests.checkpoints import make_checkpoint
from tests.distributed.layout_matrix import leave, objective_of, sequences_of
from tests.distributed.spawn import run_ranks

# Buffers are filled up to a multiple of 128 elements for each data-parallel rank: the contract's 1 %.
RELATIVE = 0.01
CASES: list[tuple[str, dict[str, Any], bool, Dtype]] = [
    ("qwen3", {}, True, Dtype.bfloat16),
    ("qwen3", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, True, Dtype.float32),
    ("qwen3", {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}, True, Dtype.bfloat16),
    ("qwen3", {"context_parallel_size": 2}, False, Dtype.bfloat16),
    ("qwen3_moe", {"expert_model_parallel_size": 2}, True, Dtype.float32),
    ("qwen3_moe", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, True, Dtype.bfloat16),
]


def measured(rank: int, root: Path) -> list[tuple[dict[str, int], dict[str, int]]]:
    """(bytes allocated, bytes planned) of this rank, of each case."""
    results = []
    for family, layout, distributed, dtype in CASES:
        config = Config(name="a", parallel=ParallelConfig(**layout))
        config.model.hf_path, config.model.params_dtype = str(root / family), dtype
        config.optimizer = OptimizerConfig(use_distributed_optimizer=distributed)
        groups = initialize(config.parallel, seed=1)
        policy = Policy(config.model, groups, config.parallel, use_distributed_optimizer=distributed)
        optimizer = Optimizer(config.optimizer, policy, num_steps=1)
        sequences = sequences_of("grpo")
        batch = MiniBatch.of(sequences, range(12), groups, micro_batch_tokens=4096, pad_to_multiple=1)
        forward_backward(policy, batch.micro_batches, objective_of("grpo", batch))
        optimizer.step()
        placed = layout_of(config, 2)
        etp = placed.expert_tensor_parallel_size or placed.tensor_model_parallel_size
        sizes = model_sizes(
            read_json_object(root / family / "config.json", "x"), tp=placed.tensor_model_parallel_size, etp=etp
        )
        stage = plan(config, sizes, placed, tokens_per_step=100).stages[groups.pp.rank()]
        planned = {name: getattr(stage, name) for name in ("parameters", "weights", "gradients", "optimizer")}
        results.append((allocated(policy, optimizer), planned))
        leave()
    return results


def allocated(policy: Policy, optimizer: Optimizer) -> dict[str, int]:
    parameters = [p for model in policy.models for p in model.parameters()]
    buffers = [b for chunk in policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    held = 0
    for one in getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                state = [x for x in one.optimizer.state[parameter].values() if isinstance(x, torch.Tensor) and x.dim()]
                # Beside bfloat16 weights the optimizer's parameters are float32 copies; else they are the weights.
                copies = [parameter] if policy.dtype is torch.bfloat16 else []
                held += sum(x.numel() * x.element_size() for x in (*state, *copies))
    return {
        "parameters": sum(p.numel() for p in parameters),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": held,
    }


def test_the_plan_is_what_is_allocated(tmp_path: Path) -> None:
    sizes = dict(hidden_size=96, intermediate_size=128, num_hidden_layers=4)
    for family in ("qwen3", "qwen3_moe"):
        make_checkpoint(tmp_path / family, family, seed=1, **sizes)
    for of_rank in run_ranks(measured, 2, tmp_path, timeout_s=300.0):
        for case, (found, planned) in zip(CASES, of_rank, strict=True):
            assert found == pytest.approx(planned, rel=RELATIVE), case
            assert found["parameters"] == planned["parameters"]


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MICRO_BATCH_TOKENS, NUM_MICRO_BATCHES = 512, 3
KEPT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3", {}, {}),
    ("qwen3", {}, FULL),
    ("qwen3", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
    ("qwen3", {"pipeline_model_parallel_size": 2}, {}),
    ("llama", {"context_parallel_size": 2}, {}),
    ("nemotron", {}, {}),
    ("qwen3_moe", {"expert_model_parallel_size": 2}, {}),
]
# The estimate is of the large tensors. Indices, sums of norms and probabilities of routing are left out, one for a
# token or one for each expert beside hundreds of channels; and experts do not get equally many tokens.
ACTIVATIONS_RELATIVE = 0.1


class Kept:
    """Bytes of the tensors that autograd keeps for the backward pass, each storage once; the parameters are not."""

    def __init__(self, policy: Policy) -> None:
        tensors = [x for model in policy.models for x in (*model.parameters(), *model.buffers())]
        self._not_counted = {x.untyped_storage().data_ptr() for x in tensors}
        self._times: dict[int, int] = {}
        self._now = self.most = 0

    def watch(self) -> AbstractContextManager[Any]:
        counts = self

        class Saved:
            """Lives as long as the graph's node that saved the tensor."""

            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor, self.storage = tensor, tensor.untyped_storage()
                counts.change(self.storage, 1)

            def __del__(self) -> None:
                counts.change(self.storage, -1)

        return torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor)

    def change(self, storage: Any, by: int) -> None:
        place = storage.data_ptr()
        if place in self._not_counted:
            return
        before = self._times.get(place, 0)
        self._times[place] = before + by
        if before == 0 or before + by == 0:
            self._now += by * storage.nbytes()
            self.most = max(self.most, self._now)


def kept_and_planned(rank: int, root: Path) -> list[tuple[int, int]]:
    """(most bytes kept, bytes planned) of this rank's activations, of each case."""
    rng = np.random.default_rng(0)
    lengths = (MICRO_BATCH_TOKENS // 2, MICRO_BATCH_TOKENS // 2)
    sequences = [TrainingSequence(rng.integers(3, 250, n + 1), np.ones(n, dtype=np.float32)) for n in lengths]
    results = []
    for family, layout, model in KEPT:
        config = Config(name="a", parallel=ParallelConfig(**layout))
        config.model = ModelConfig(
            hf_path=str(root / family), params_dtype=Dtype.float32, layer_spec=LayerSpec.portable, **model
        )
        config.train.micro_batch_tokens = MICRO_BATCH_TOKENS
        groups = initialize(config.parallel, seed=1)
        policy = Policy(config.model, groups, config.parallel)
        micro_batches = [pack(sequences, [0, 1], pad_to_multiple=1) for _ in range(NUM_MICRO_BATCHES)]
        kept = Kept(policy)
        with kept.watch():
            forward_backward(policy, micro_batches, lambda log_probs, entropy, micro_batch: (log_probs.sum(), {}))
        placed = layout_of(config, 2)
        sizes = model_sizes(
            read_json_object(root / family / "config.json", "x"), tp=groups.tp.size(), etp=groups.etp.size()
        )
        tokens = NUM_MICRO_BATCHES * MICRO_BATCH_TOKENS * placed.data_parallel_size
        stage = plan(config, sizes, placed, tokens_per_step=tokens).stages[groups.pp.rank()]
        results.append((kept.most, stage.activations))
        leave()
    return results


def test_the_planned_activations_are_what_is_kept(tmp_path: Path) -> None:
    sizes = dict(hidden_size=256, intermediate_size=640, head_dim=48, num_hidden_layers=4)
    for family in {family for family, _, _ in KEPT}:
        experts = {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
        make_checkpoint(tmp_path / family, family, seed=1, **sizes, **experts)
    for of_rank in run_ranks(kept_and_planned, 2, tmp_path, timeout_s=300.0):
        ratios = {str(case): planned / kept for case, (kept, planned) in zip(KEPT, of_rank, strict=True)}
        assert all(abs(ratio - 1) <= ACTIVATIONS_RELATIVE for ratio in ratios.values()), ratios
