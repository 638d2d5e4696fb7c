"""Accuracy and pass@k on literal completions. The engine is a stand-in that answers from a table."""

from collections.abc import Sequence
from typing import Any, cast

import pytest

from megatron_rl.config.schema import Config, EvaluationConfig, RewardFunctionConfig, RewardsConfig
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.rewards.scoring import resolve_rewards, score
from megatron_rl.rollout.sampling import Sampling
from megatron_rl.runs.progress import Progress
from megatron_rl.trainer.evaluation import evaluate
from megatron_rl.trainer.rollouts import RolloutWorker, draw_seeds

PROMPTS = [Prompt(i, (1,), f"{i}=", answer=str(i), source=f"heldout.jsonl:{i + 1}") for i in range(3)]
ANSWERS = [["0", "7"], ["5", "6"], ["2", "2"]]
"""Two completions of each prompt: one right, none, both."""


class TableWorker:
    """Completes from `ANSWERS` and scores for real; remembers how it was asked."""

    def __init__(self, rewards: RewardsConfig) -> None:
        self.rewards = resolve_rewards(rewards)
        self.asked: dict[str, Any] = {}

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, num_samples: int, progress: Progress
    ) -> list[list[Completion]]:
        self.asked = dict(prompts=list(prompts), seeds=list(seeds), sampling=sampling, num_samples=num_samples)
        return [
            [
                Completion((1,) * n, (-1.0,) * n, text, "stop" if n == 1 else "length", 0)
                for n, text in enumerate(texts, 1)
            ]
            for texts in ([*answers[:num_samples]] for answers in ANSWERS[: len(prompts)])
        ]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Sample]]:
        return [score([p] * len(c), c, self.rewards) for p, c in zip(prompts, completions, strict=True)]


def run(evaluation: EvaluationConfig, *rewards: RewardFunctionConfig) -> tuple[dict[str, float], TableWorker]:
    functions = list(rewards) or [RewardFunctionConfig("exact_match", weight=0.5)]
    config = Config(name="run", rewards=RewardsConfig(functions), evaluation=evaluation)
    config.rollout.sampling.temperature, config.rollout.sampling.stop = 0.7, ["\n"]
    worker = TableWorker(config.rewards)
    metrics, samples = evaluate(config, cast(RolloutWorker, worker), PROMPTS, Progress(1, "run", enabled=False))
    assert [len(of_prompt) for of_prompt in samples] == [worker.asked["num_samples"]] * len(worker.asked["prompts"])
    return metrics, worker


def test_accuracy_is_over_samples_and_pass_at_k_over_prompts() -> None:
    metrics, _ = run(EvaluationConfig(name="sums", num_samples_per_prompt=2, temperature=1.0))
    assert metrics == {
        "eval/sums/accuracy": 3 / 6,
        "eval/sums/pass_at_k": 2 / 3,
        "eval/sums/reward_mean": pytest.approx(0.25),  # the same three, at a weight of 0.5
        "eval/sums/reward/exact_match": 3 / 6,  # each reward by itself, without its weight
        "eval/sums/response_length_mean": 1.5,  # of 1 and 2 tokens each
        "eval/sums/truncated_fraction": 0.5,
    }


def test_greedy_has_no_pass_at_k() -> None:
    metrics, worker = run(EvaluationConfig())
    assert metrics["eval/heldout/accuracy"] == pytest.approx(2 / 3)  # the first answers: right, wrong, right
    assert "eval/heldout/pass_at_k" not in metrics
    assert worker.asked["sampling"].temperature == 0.0


def test_one_reward_decides_what_is_correct() -> None:
    """A weighted sum above 1 does not make a completion correct, nor a weight below 1 a correct one wrong."""
    both = [RewardFunctionConfig("tests.unit.trainer.test_evaluation:generous"), RewardFunctionConfig("exact_match")]
    metrics, _ = run(EvaluationConfig(correct_reward="exact_match"), *both)
    assert metrics["eval/heldout/accuracy"] == pytest.approx(2 / 3)
    metrics, _ = run(EvaluationConfig(), *both)  # the first one: 0.9 is not enough
    assert metrics["eval/heldout/accuracy"] == 0.0
    assert metrics["eval/heldout/reward_mean"] == pytest.approx(0.9 + 2 / 3)


def generous() -> float:
    """A reward for everyone."""
    return 0.9


def test_how_completions_are_drawn() -> None:
    _, worker = run(EvaluationConfig(temperature=0.6, top_p=0.9, num_samples_per_prompt=2, max_prompts=2))
    assert worker.asked["prompts"] == PROMPTS[:2]
    assert worker.asked["sampling"] == Sampling(temperature=0.6, top_p=0.9, max_response_tokens=256, stop=("\n",))
    # The same at every evaluation of the run, and none of those that training draws at any position.
    seeds = worker.asked["seeds"]
    assert seeds == run(EvaluationConfig(temperature=0.6, max_prompts=2))[1].asked["seeds"]
    assert not set(seeds) & set(draw_seeds(Config.seed, 0, 1000))
