"""The head inside the engine: gradients of a whole model against transformers', and what a forward pass keeps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.algorithms.aggregation import GlobalCounts
from megatron_rl.algorithms.metrics import Metric
from megatron_rl.config.schema import AlgorithmConfig, Dtype, KLConfig, ModelConfig, SupervisedConfig
from megatron_rl.data.packing import MicroBatch, pack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.reference import Teacher, reference_logits
from megatron_rl.objectives.losses import resolve_supervised_loss
from megatron_rl.objectives.objectives import SupervisedObjective
from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks

NAMES = {"qwen3": "embedding.word_embeddings.weight", "qwen3_untied": "output_layer.weight"}
"""Family -> the parameter that the head differentiates."""
WEIGHTS = (0.3, -0.2)
"""Of the tokens' log-probs, by turns: both signs, as advantages have."""


def sequences() -> list[TrainingSequence]:
    rng = np.random.default_rng(0)
    return [TrainingSequence(rng.integers(3, 259, size=n + 1), np.ones(n, np.float32)) for n in (5, 9, 4)]


class Whole:
    """A loss of the whole micro-batch: the two-pass head."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, micro_batch: MicroBatch) -> Any:
        weights = torch.tensor(WEIGHTS * len(log_probs))[: len(log_probs)]
        losses = torch.where(micro_batch.loss_mask > 0, weights * log_probs - 0.1 * entropy, 0.0)
        return losses.sum(), {"loss": Metric("sum", float(losses.detach().sum()))}


class TokenByToken(Whole):
    """The same, said token by token: the single-pass head."""

    def token_losses(self, micro_batch: MicroBatch) -> Any:
        weights = torch.tensor(WEIGHTS * len(micro_batch.tokens))[: len(micro_batch.tokens)] * micro_batch.loss_mask
        return lambda log_probs, entropy, tokens: (
            weights[tokens] * log_probs - 0.1 * micro_batch.loss_mask[tokens] * entropy
        )


class Inherited(TokenByToken):
    """Another loss, which inherited the method: it must not be taken for the parent's."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, micro_batch: MicroBatch) -> Any:
        loss = super().__call__(log_probs, entropy, micro_batch)[0] * 2
        return loss, {"loss": Metric("sum", float(loss.detach()))}


OBJECTIVES = {"whole": Whole, "token_by_token": TokenByToken}
SUPERVISED = "supervised"
SMOOTHING, KL = 0.1, 0.5
"""Of the third objective: label smoothing, and the exact KL from another checkpoint, per token."""


def supervised(policy: Any, teacher: Path, layout: str, micro_batch: MicroBatch) -> Any:
    """The objective of such a run."""
    algorithm = AlgorithmConfig(
        supervised=SupervisedConfig("label_smoothed", {"smoothing": SMOOTHING}), kl=KLConfig(coefficient=KL)
    )
    counts = GlobalCounts(num_tokens=float(micro_batch.loss_mask.sum()), num_sequences=3.0)
    from tests.distributed.training_ranks import parallel_of

    settings = ModelConfig(hf_path=str(teacher), params_dtype=Dtype.float32)
    reference = Teacher(Policy(settings, policy.groups, parallel_of(layout), trained=False))
    loss = resolve_supervised_loss(algorithm.supervised)
    return SupervisedObjective(algorithm, counts, 1.0, loss, reference_logits(reference, policy, [micro_batch]))


def all_gradients(
    rank: int, checkpoints: dict[str, Path], teachers: dict[str, Path], layouts: tuple[str, ...]
) -> dict[tuple[str, str], Any]:
    """`gradients_of` for each family and layout of this world's size, one after another."""
    from megatron.core import parallel_state

    found = {}
    for family, checkpoint in checkpoints.items():
        for layout in layouts:
            found[family, layout] = gradients_of(checkpoint, teachers[family], layout, NAMES[family])
            parallel_state.destroy_model_parallel()
    return found


def gradients_of(checkpoint: Path, teacher: Path, layout: str, parameter: str) -> dict[str, Any]:
    """For each objective: loss, and this rank's rows of the gradient of the head's weight, after reduction."""
    from megatron_rl.engine import policy as policy_module
    from megatron_rl.engine.step import forward_backward
    from tests.distributed.training_ranks import start_policy

    settings = policy_module.DistributedDataParallelConfig
    # At dp2 buckets are reduced as soon as DistributedDataParallel's hooks have seen all their parameters.
    overlap = {"overlap_grad_reduce": layout == "dp2"}
    policy_module.DistributedDataParallelConfig = lambda **given: settings(**given | overlap)
    try:
        # Without the distributed optimizer every rank's main_grad ends as the whole sum.
        policy = start_policy(checkpoint, layout, use_distributed_optimizer=False)
    finally:
        policy_module.DistributedDataParallelConfig = settings
    groups, found = policy.groups, {}
    micro_batch = pack(sequences(), range(3), pad_to_multiple=2)
    objectives = {name: objective() for name, objective in OBJECTIVES.items()}
    objectives[SUPERVISED] = supervised(policy, teacher, layout, micro_batch)
    for name, objective in objectives.items():
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()
        metrics = forward_backward(policy, [micro_batch], objective, temperature=0.8)
        weight = policy.parameters.get(parameter)
        assert weight is None or weight.grad is None  # only main_grad may hold it
        grad = None if weight is None else weight.main_grad.clone().numpy()
        loss = metrics.get("loss", metrics.get("sft/loss")) if metrics else None
        found[name] = (None if loss is None else loss.value, groups.tp.rank(), grad)
    if layout == "tp1":
        check_inherited(policy, micro_batch)
    return found


def check_inherited(policy: Any, micro_batch: MicroBatch) -> None:
    from megatron_rl.engine.step import forward_backward

    norms = []
    for objective in (Whole(), Inherited()):
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()
        forward_backward(policy, [micro_batch], objective, temperature=0.8)
        norms.append(sum(float(p.main_grad.double().square().sum()) for p in policy.parameters.values()) ** 0.5)
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


def expected_of(checkpoint: Path, teacher: Path) -> dict[str, tuple[float, np.ndarray]]:
    """Loss and gradient of each objective by transformers in float32, whole logits, sequence by sequence."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (checkpoint, teacher)]
    total, smoothed, place = torch.zeros(()), torch.zeros(()), 0
    for sequence in sequences():
        ids = torch.from_numpy(sequence.token_ids)[None]
        log_softmax, of_teacher = ((model(ids[:, :-1]).logits[0] / 0.8).log_softmax(1) for model in models)
        log_probs = log_softmax.gather(1, ids[0, 1:, None])[:, 0]
        entropy = -(log_softmax.exp() * log_softmax).sum(1)
        weights = torch.tensor([WEIGHTS[(place + i) % 2] for i in range(len(log_probs))])
        total, place = total + (weights * log_probs - 0.1 * entropy).sum(), place + len(log_probs)
        kl = (log_softmax.exp() * (log_softmax - of_teacher.detach())).sum(1)
        smoothed = smoothed + (-(1 - SMOOTHING) * log_probs - SMOOTHING * log_softmax.mean(1) + KL * kl).sum()
    found = {}
    for name, loss in {**dict.fromkeys(OBJECTIVES, total), SUPERVISED: smoothed / place}.items():
        weight = models[0].get_output_embeddings().weight
        weight.grad = None
        loss.backward(retain_graph=True)
        assert weight.grad is not None
        found[name] = float(loss.detach()), weight.grad.numpy()
    return found


def test_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    checkpoints = {family: make_checkpoint(tmp_path / family, family, seed=5) for family in NAMES}
    teachers = {family: make_checkpoint(tmp_path / f"{family}_teacher", family, seed=6) for family in NAMES}
    expected = {family: expected_of(checkpoints[family], teachers[family]) for family in NAMES}
    for num_ranks, layouts in ((1, ("tp1",)), (2, ("tp2_sp", "pp2", "cp2", "dp2"))):
        results = run_ranks(all_gradients, num_ranks, checkpoints, teachers, layouts)
        for case in results[0]:
            family, layout = case
            for name in expected[family]:
                of_ranks = [of_rank[case][name] for of_rank in results]
                check_gradients(of_ranks, *expected[family][name], replicas=2 if layout == "dp2" else 1)


def check_gradients(of_ranks: list[Any], loss: float, expected: np.ndarray, *, replicas: int) -> None:
    """The shards joined are the expected gradient, times the replicas, each of which computes the same micro-batch."""
    shards = {tp_rank: grad for _, tp_rank, grad in of_ranks if grad is not None}
    grad = np.concatenate([shards[i] for i in sorted(shards)])[:259]
    # float32 sums in another order; gradients are of the order 1.
    np.testing.assert_allclose(grad, replicas * expected, atol=2e-5, rtol=1e-4)
    losses = [value for value, *_ in of_ranks if value is not None]
    assert losses
    assert losses == pytest.approx([loss] * len(losses), rel=1e-5)


def forward_only(rank: int, checkpoint: Path) -> None:
    """The two heads of a forward pass without gradient: no tensor is saved for a backward pass."""
    from megatron_rl.engine.step import forward_log_probs
    from tests.distributed.training_ranks import start_policy

    policy = start_policy(checkpoint, "tp1")
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor)
    with hooks:
        ((log_probs, entropy),) = forward_log_probs(policy, [pack(sequences(), range(3), pad_to_multiple=1)])
    assert kept == []
    assert not log_probs.requires_grad
    assert not entropy.requires_grad


def test_a_forward_only_pass_keeps_no_activations(tmp_path: Path) -> None:
    run_ranks(forward_only, 1, make_checkpoint(tmp_path, "qwen3", seed=5))
