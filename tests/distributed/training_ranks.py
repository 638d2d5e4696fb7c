"""What the distributed tests run inside each rank: build a policy of a checkpoint at a layout, and train it."""

from pathlib import Path
from typing import Any

import numpy as np

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.checkpoint.hf_export import export_hf
from megatron_rl.config.schema import (
    Aggregation,
    AlgorithmConfig,
    Dtype,
    KLConfig,
    LRDecayStyle,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyLossConfig,
)
from megatron_rl.data.packing import pack, unpack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_backward, forward_log_probs
from megatron_rl.objectives.losses import resolve_policy_loss
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.objectives.objectives import PolicyGradientObjective, SupervisedObjective
from megatron_rl.parallel.groups import reduce_metrics

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"context_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "etp2": (2, {"expert_tensor_parallel_size": 2}),
    "tp2_sp_etp1": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
    ),
    "dp4": (4, {}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
"""Name -> (number of ranks, ParallelConfig)."""

NUM_STEPS = 5


def start_policy(checkpoint: Path, layout: str, *, use_distributed_optimizer: bool = True, **model: Any) -> Policy:
    """Join the world at a layout and build the float32 policy of a checkpoint."""
    parallel = parallel_of(layout)
    groups = initialize(parallel, seed=1)
    settings = ModelConfig(hf_path=str(checkpoint), params_dtype=Dtype.float32, **model)
    return Policy(settings, groups, parallel, use_distributed_optimizer=use_distributed_optimizer)


def parallel_of(layout: str) -> ParallelConfig:
    """The settings of a layout."""
    return ParallelConfig(**LAYOUTS[layout][1])


def recorded_rollouts(num_sequences: int = 12) -> list[TrainingSequence]:
    """Sequences of uneven length with everything that an objective reads, drawn once from a fixed seed."""
    rng = np.random.default_rng(7)
    sequences = []
    for _ in range(num_sequences):
        prompt, response = int(rng.integers(1, 6)), int(rng.integers(1, 14))
        mask = np.zeros(prompt + response - 1, dtype=np.float32)
        mask[prompt - 1 :] = 1.0
        # Log-probs near those of a random model of 259 tokens, ln(1/259) = -5.6, so that ratios are on both sides of
        # the clipping bounds.
        near = {name: (rng.normal(-5.6, 0.3, mask.shape) * mask).astype(np.float32) for name in _LOG_PROBS}
        advantages = (rng.normal() * mask).astype(np.float32)
        tokens = rng.integers(3, 259, size=prompt + response)
        sequences.append(TrainingSequence(tokens, mask, {"advantages": advantages, **near}))
    return sequences


_LOG_PROBS = ("old_log_probs", "ref_log_probs", "rollout_log_probs")


def train_recorded(
    rank: int, checkpoint: Path, layout: str, micro_batch_tokens: int, model: dict[str, Any]
) -> dict[str, list[dict[str, float]]]:
    """NUM_STEPS optimizer steps of SFT, and of GRPO, on the recorded rollouts; the metrics of each step."""
    policy = start_policy(checkpoint, layout, **model)
    rows = {"sft": _train(policy, micro_batch_tokens, "sft")}
    policy.load_hf_weights(checkpoint)
    return rows | {"grpo": _train(policy, micro_batch_tokens, "grpo")}


def _train(policy: Policy, micro_batch_tokens: int, kind: str) -> list[dict[str, float]]:
    settings = OptimizerConfig(lr=1e-3, lr_decay_style=LRDecayStyle.linear, lr_warmup_steps=2, weight_decay=0.1)
    optimizer = Optimizer(settings, policy, num_steps=NUM_STEPS)
    algorithm = AlgorithmConfig(
        policy_loss=PolicyLossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0),
        kl=KLConfig(coefficient=0.1),
        entropy_coefficient=0.01,
        aggregation=Aggregation.sequence_mean_token_mean,
    )
    sequences = recorded_rollouts()
    rows = []
    for step in range(NUM_STEPS):
        batch = MiniBatch.of(
            sequences,
            range(step, len(sequences)),  # a batch of another size each step
            policy.groups,
            micro_batch_tokens=micro_batch_tokens,
            pad_to_multiple=1,
            num_micro_batches_multiple=policy.groups.pp.size(),
        )
        if kind == "sft":
            objective = SupervisedObjective(algorithm, batch.counts, token_sum_norm=16.0)
        else:
            objective = PolicyGradientObjective(
                algorithm,
                batch.counts,
                token_sum_norm=16.0,
                policy_loss=resolve_policy_loss(algorithm.policy_loss),
                on_policy=False,
                kl_coefficient=algorithm.kl.coefficient,
            )
        optimizer.zero_grad()
        metrics = forward_backward(policy, batch.micro_batches, objective, temperature=0.8)
        update = optimizer.step()
        row = reduce_metrics(metrics, policy.groups.world)
        rows.append(row | {"grad_norm": update.grad_norm, "lr": update.lr})
    return rows


def log_probs_of(rank: int, checkpoint: Path, layout: str, sequences: list[list[int]]) -> list[np.ndarray]:
    """Log-probs of every token after the first of each sequence, at a layout; every replica computes all of them."""
    policy = start_policy(checkpoint, layout)
    training = [TrainingSequence(np.array(s), np.ones(len(s) - 1, dtype=np.float32)) for s in sequences]
    micro_batch = pack(training, range(len(training)), pad_to_multiple=2)
    ((log_probs, _),) = forward_log_probs(policy, [micro_batch])
    return [part.numpy() for part in unpack(log_probs, micro_batch)]


def round_trip(rank: int, checkpoint: Path, layout: str, output: Path) -> None:
    """Import a checkpoint at a layout and export it again."""
    export_hf(start_policy(checkpoint, layout), output)
