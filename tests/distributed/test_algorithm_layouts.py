"""No objective's loss or gradient depends on the layout or on the micro-batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint, make_classifier
from tests.distributed.algorithm_ranks import (
    KL_COEFFICIENT,
    SHARED_COEFFICIENT,
    SMOOTHING,
    Results,
    update_of_every_objective,
    value_weights,
)
from tests.distributed.spawn import run_ranks
from tests.distributed.training_ranks import LAYOUTS, recorded_rollouts

# Sums over tokens and ranks in another order: float32 rounds at 6e-8, and a norm sums hundreds of terms.
RELATIVE = 2e-5
WHOLE, SMALL = 4096, 24  # micro_batch_tokens: one micro-batch for everything, or many micro-batches

Checkpoints = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    policy = make_checkpoint(tmp_path_factory.mktemp("policy"), "qwen3", seed=3)
    classifier = make_classifier(tmp_path_factory.mktemp("scalar"), "qwen3", seed=4, per_token=True)
    return policy, classifier, make_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3", seed=5)


@pytest.fixture(scope="module")
def reference(checkpoints: Checkpoints) -> Results:
    return run_ranks(update_of_every_objective, 1, *checkpoints, "tp1", WHOLE)[0]


@pytest.mark.parametrize(
    "layout",
    [
        "dp2",
        "tp2_pp2",
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("tp1", "tp2_sp", "pp2", "cp2")),
    ],
)
def test_loss_and_gradient_are_equal(checkpoints: Checkpoints, reference: Results, layout: str) -> None:
    for of_rank in run_ranks(update_of_every_objective, LAYOUTS[layout][0], *checkpoints, layout, SMALL):
        assert of_rank.keys() == reference.keys()
        for name, row in of_rank.items():
            assert row == pytest.approx(reference[name], rel=RELATIVE, abs=1e-6, nan_ok=True), name


def test_the_reference_is_worth_comparing_with(reference: Results) -> None:
    """Every objective has a gradient, and no two the same one; bounds are at work, but not everywhere."""
    norms = {name: row["grad_norm"] for name, row in reference.items() if "grad_norm" in row}
    assert all(norm > 1e-4 for norm in norms.values()), norms
    assert len(set(norms.values())) == len(norms)
    for name in ("ppo_clip", "gspo", "cispo"):
        assert 0 < reference[name]["policy/clip_fraction"] < 1, name
    advantages = [tuple(row.values()) for name, row in reference.items() if "advantage_0" in row]
    assert len(set(advantages)) == len(advantages) == 24  # 8 estimators, 3 ways to whiten


def of_transformers(folder: Path) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A model in float64, and of each recorded sequence its last hidden states and its logits."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for sequence in recorded_rollouts():
        hidden = model.model(torch.tensor(sequence.token_ids[None, :-1])).last_hidden_state[0]
        found.append((hidden, model.lm_head(hidden)))
    return model, found


def gradient_norm(loss: torch.Tensor, model: Any, *others: torch.Tensor) -> float:
    loss.backward()
    gradients = [p.grad for p in (*model.parameters(), *others) if p.grad is not None]
    return float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())


@pytest.mark.parametrize("direction", ["reverse", "forward", "jensen_shannon"])
def test_distillation_and_smoothing_are_those_of_whole_distributions(
    checkpoints: Checkpoints, reference: Results, direction: str
) -> None:
    """-(1 - eps) log p - eps mean log p + c D(p, q), from transformers' logits in float64."""
    model, students = of_transformers(checkpoints[0])
    with torch.no_grad():
        _, teachers = of_transformers(checkpoints[2])
    losses, divergences = [], []
    for sequence, (_, student), (_, teacher) in zip(recorded_rollouts(), students, teachers, strict=True):
        trained = torch.tensor(sequence.loss_mask) > 0
        p, q = student.log_softmax(1)[trained], teacher.log_softmax(1)[trained]
        target = p.gather(1, torch.tensor(sequence.token_ids[1:])[trained, None])[:, 0]
        middle = torch.log(0.3 * q.exp() + 0.7 * p.exp())
        divergence = {
            "reverse": (p.exp() * (p - q)).sum(1),
            "forward": (q.exp() * (q - p)).sum(1),
            "jensen_shannon": 0.3 * (q.exp() * (q - middle)).sum(1) + 0.7 * (p.exp() * (p - middle)).sum(1),
        }[direction]
        losses.append(-(1 - SMOOTHING) * target - SMOOTHING * p.mean(1) + KL_COEFFICIENT * divergence)
        divergences.append(divergence.detach())
    loss, found = torch.cat(losses).mean(), reference[f"smoothed_{direction}"]
    # Logits of the two libraries differ by float32 rounding after two layers.
    assert found["sft/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found["policy/kl_ref"] == pytest.approx(float(torch.cat(divergences).detach().mean()), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(gradient_norm(loss, model), rel=1e-4)


def clipped_surrogates(sequence: Any, logits: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """PPO's loss of the trained tokens of a sequence, clipped at 0.8 and 1.2."""
    labels = torch.tensor(sequence.token_ids[1:])[trained, None]
    log_probs = logits.log_softmax(1)[trained].gather(1, labels)[:, 0]
    old, advantages = (torch.tensor(sequence.per_token[name])[trained] for name in ("old_log_probs", "advantages"))
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def test_the_critic_on_the_backbone_trains_it(checkpoints: Checkpoints, reference: Results) -> None:
    """The clipped surrogate + c times half the squared error of a linear head, from transformers' hidden states."""
    model, outputs = of_transformers(checkpoints[0])
    weight = value_weights(outputs[0][0].shape[1]).double().requires_grad_()
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    policy, values = [], []
    for sequence, (hidden, logits) in zip(recorded_rollouts(), outputs, strict=True):
        trained = torch.tensor(sequence.loss_mask) > 0
        policy.append(clipped_surrogates(sequence, logits, trained))
        returns = 3 * torch.tensor(sequence.per_token["advantages"])[trained]
        values.append((hidden[trained] @ weight + bias - returns).square() / 2)
    value = torch.cat(values).mean()
    loss, found = torch.cat(policy).mean() + SHARED_COEFFICIENT * value, reference["actor_critic"]
    assert found["value/loss"] == pytest.approx(float(value.detach()), rel=1e-5)
    assert found["policy/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(gradient_norm(loss, model, weight, bias), rel=1e-4)
    assert not math.isclose(found["grad_norm"], reference["ppo_clip"]["grad_norm"], rel_tol=0.1)


def test_the_exact_kl_of_a_policy_gradient_is_of_whole_distributions(
    checkpoints: Checkpoints, reference: Results
) -> None:
    model, students = of_transformers(checkpoints[0])
    with torch.no_grad():
        _, teachers = of_transformers(checkpoints[2])
    losses, divergences = [], []
    for sequence, (_, student), (_, teacher) in zip(recorded_rollouts(), students, teachers, strict=True):
        trained = torch.tensor(sequence.loss_mask) > 0
        p, q = student.log_softmax(1)[trained], teacher.log_softmax(1)[trained]
        divergences.append((p.exp() * (p - q)).sum(1))
        losses.append(clipped_surrogates(sequence, student, trained) + KL_COEFFICIENT * divergences[-1])
    loss, found = torch.cat(losses).mean(), reference["ppo_exact_kl"]
    assert found["policy/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found["policy/kl_ref"] == pytest.approx(float(torch.cat(divergences).detach().mean()), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(gradient_norm(loss, model), rel=1e-4)
