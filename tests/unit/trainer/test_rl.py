"""What the verbs compute between engine and model, on literal samples; engine and model themselves are not built."""

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from megatron_rl.config.schema import (
    AdvantageConfig,
    AlgorithmConfig,
    Config,
    EvaluationConfig,
    KLConfig,
    KLEstimator,
    KLPlace,
    LoggingConfig,
    TrainConfig,
)
from megatron_rl.data.datasets import training_sequence
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.objectives.advantages import resolve_estimator
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.objectives.penalties import KLPenalty
from megatron_rl.parallel.groups import Groups
from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.record import RunState
from megatron_rl.trainer.rl import MismatchError, RLTrainer, check_mismatch


@pytest.fixture
def groups() -> Iterator[Groups]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    yield Groups(**dict.fromkeys((field.name for field in fields(Groups)), world))
    dist.destroy_process_group()


def sample(prompt_id: int, num_tokens: int, reward: float, *, version: int = 2, finish: str = "stop") -> Sample:
    prompt = Prompt(prompt_id, (7, 8), f"prompt {prompt_id}", "42", f"train.jsonl:{prompt_id + 1}")
    completion = Completion((9,) * num_tokens, (-1.0,) * num_tokens, "text", finish, version)
    return Sample(prompt, completion, reward, {"exact_match": reward, "think_format": 1.0})


# Two prompts, their samples not side by side: groups go by prompt, not by place.
SAMPLES = [sample(4, 1, 1.0), sample(0, 2, 3.0, finish="length"), sample(4, 3, 0.0), sample(0, 2, 5.0, version=1)]


def reinforcement(
    *, algorithm: AlgorithmConfig | None = None, reference: object = None, groups: Groups | None = None, **config: Any
) -> RLTrainer:
    """The object around given settings, at step 2, without what needs an engine or a model."""
    rl = object.__new__(RLTrainer)
    rl.config = Config(algorithm=algorithm or AlgorithmConfig(), **config)
    rl.training = cast(Any, SimpleNamespace(reference=reference, groups=groups, state=RunState(step=2), is_main=True))
    rl.estimator = resolve_estimator(rl.config.algorithm.advantage)
    rl.kl = KLPenalty(rl.config.algorithm.kl, cast(Any, reference), rl.training.state)
    return rl


def batches_of(samples: list[Sample], groups: Groups, micro_batch_tokens: int) -> list[MiniBatch]:
    """Two updates of two samples each."""
    sequences = [training_sequence(s) for s in samples]
    sizes = dict(micro_batch_tokens=micro_batch_tokens, pad_to_multiple=4)
    return [MiniBatch.of(sequences, chosen, groups, **sizes) for chosen in ([0, 1], [2, 3])]


def per_sequence(batches: list[MiniBatch], name: str) -> dict[int, list[float]]:
    """A per-token value by sample, from the micro-batches."""
    found = {}
    for micro_batch in (micro_batch for batch in batches for micro_batch in batch.micro_batches):
        starts = micro_batch.cu_seqlens.tolist()
        for i, start, end in zip(micro_batch.sequence_ids, starts, starts[1:], strict=False):
            found[i] = micro_batch.per_token[name][start:end].tolist()
    return found


@pytest.mark.parametrize("micro_batch_tokens", [1, 100])
def test_advantages_are_over_the_groups_of_a_prompt(groups: Groups, micro_batch_tokens: int) -> None:
    rl = reinforcement(algorithm=AlgorithmConfig(advantage=AdvantageConfig(normalize_by_std=False)), groups=groups)
    batches = batches_of(SAMPLES, groups, micro_batch_tokens)
    # Prompt 4: rewards 1 and 0; prompt 0: rewards 3 and 5.
    assert rl.advantages(SAMPLES, batches).tolist() == [0.5, -1.0, -0.5, 1.0]
    # On the completion's tokens, the prompt having one position before them.
    assert per_sequence(batches, "advantages") == {
        0: [0.0, 0.5],
        1: [0.0, -1.0, -1.0],
        2: [0.0, -0.5, -0.5, -0.5],
        3: [0.0, 1.0, 1.0],
    }


def kl_algorithm(place: KLPlace) -> AlgorithmConfig:
    kl = KLConfig(coefficient=0.5, estimator=KLEstimator.k1, place=place)
    return AlgorithmConfig(kl=kl, advantage=AdvantageConfig(normalize_by_std=False))


def add_log_probs(batches: list[MiniBatch]) -> None:
    """A distance of 1 + sample number per token between the policies; nan where nothing is trained."""
    for micro_batch in (micro_batch for batch in batches for micro_batch in batch.micro_batches):
        old = torch.where(micro_batch.loss_mask > 0, -1.0, torch.nan)
        micro_batch.per_token["old_log_probs"] = old
        distance = torch.zeros_like(old)
        starts = micro_batch.cu_seqlens.tolist()
        for i, start, end in zip(micro_batch.sequence_ids, starts, starts[1:], strict=False):
            distance[start:end] = 1.0 + i
        micro_batch.per_token["ref_log_probs"] = old - distance


@pytest.mark.parametrize("micro_batch_tokens", [1, 100])
def test_kl_in_the_reward_is_summed_over_a_completion(groups: Groups, micro_batch_tokens: int) -> None:
    rl = reinforcement(algorithm=kl_algorithm(KLPlace.reward), reference=object(), groups=groups)
    batches = batches_of(SAMPLES, groups, micro_batch_tokens)
    add_log_probs(batches)
    # Tokens 1, 2, 3, 2 at a KL of 1, 2, 3, 4 each, times 0.5: rewards 1 - 0.5, 3 - 2, 0 - 4.5, 5 - 4.
    # Prompt 4: 0.5 and -4.5, mean -2. Prompt 0: 1 and 1.
    assert rl.advantages(SAMPLES, batches).tolist() == [2.5, 0.0, -2.5, 0.0]


def test_kl_in_the_loss_leaves_the_rewards(groups: Groups) -> None:
    rl = reinforcement(algorithm=kl_algorithm(KLPlace.loss), reference=object(), groups=groups)
    batches = batches_of(SAMPLES, groups, 100)
    add_log_probs(batches)
    assert rl.advantages(SAMPLES, batches).tolist() == [0.5, -1.0, -0.5, 1.0]


def test_report_describes_the_samples(tmp_path: Path) -> None:
    rl = reinforcement(logging=LoggingConfig(num_logged_rollouts=2))
    rl.training.run = RunDirectory(tmp_path)
    assert rl.report(SAMPLES, torch.tensor([0.5, -1.0, -0.5, 1.0])) == {
        "reward/mean": 9 / 4,
        "reward/std": pytest.approx((35 / 4 - 81 / 16) ** 0.5),  # mean of squares (1 + 9 + 25) / 4
        "reward/min": 0.0,
        "reward/max": 5.0,
        "reward/exact_match": 9 / 4,
        "reward/think_format": 1.0,
        "response/length_mean": 2.0,
        "response/truncated_fraction": 0.25,
        "staleness/mean": 0.25,  # at step 2 one of four was made by version 1
        "staleness/max": 1,
        "throughput/tokens": 8 + 4 * 2,
    }
    # Every second sample, in a file named after the step that is ending.
    lines = (tmp_path / "rollouts" / "step_0000003.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "step": 3,
            "prompt_id": 4,
            "source": "train.jsonl:5",
            "prompt": "prompt 4",
            "completion": "text",
            "answer": "42",
            "reward": reward,
            "reward_terms": {"exact_match": reward, "think_format": 1.0},
            "advantage": advantage,
            "finish_reason": "stop",
            "num_tokens": num_tokens,
            "weight_version": 2,
        }
        for reward, advantage, num_tokens in [(1.0, 0.5, 1), (0.0, -0.5, 3)]
    ]


@pytest.mark.parametrize("num_logged", [0, 1, 3, 4, 9])
def test_as_many_rollouts_are_logged_as_asked_for(num_logged: int, tmp_path: Path) -> None:
    rl = reinforcement(logging=LoggingConfig(num_logged_rollouts=num_logged))
    rl.training.run = RunDirectory(tmp_path)
    rl.report(SAMPLES, torch.zeros(4))
    lines = (tmp_path / "rollouts" / "step_0000003.jsonl").read_text().splitlines()
    assert len(lines) == min(num_logged, len(SAMPLES))


@pytest.mark.parametrize(
    ("interval", "num_steps", "is_due"),
    [
        (0, 4, False),  # only before and after training
        (0, 3, True),  # the step that is ending is the last
        (3, 10, True),
        (2, 10, False),
    ],
)
def test_evaluation_is_due_every_interval_and_at_the_end(interval: int, num_steps: int, is_due: bool) -> None:
    rl = reinforcement(evaluation=EvaluationConfig(interval=interval), train=TrainConfig(num_steps=num_steps))
    assert rl.evaluation_is_due() is is_due  # of step 3, after 2 steps done


@pytest.mark.parametrize(("num_updates", "on_policy"), [(1, True), (2, False)])
def test_only_a_single_update_is_on_policy(num_updates: int, on_policy: bool) -> None:
    rl = reinforcement()
    rl.num_updates = num_updates
    assert rl.on_policy is on_policy


def test_a_run_stops_where_engines_and_policy_are_too_far_apart() -> None:
    row = {"mismatch/log_prob_abs_diff_mean": 0.02}
    check_mismatch(row, None)
    check_mismatch(row, 0.02)
    for value in (0.021, math.nan):
        with pytest.raises(MismatchError, match=r"rollout\.max_mismatch is 0\.02"):
            check_mismatch({"mismatch/log_prob_abs_diff_mean": value}, 0.02)
