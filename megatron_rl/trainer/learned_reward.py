"""A learned reward: a classifier scores what the engines wrote, on the training ranks or in a vLLM server.

It reads prompt and completion as token ids, the end-of-sequence token included if it was sampled. An outcome model's
score is that of the last token; a process model's are those of the last tokens of the steps, and `rewards.model.credit`
says which tokens get them. On the training ranks micro-batches are laid out as for training, so every rank scores its
share; a server is asked by the first rank. All ranks learn the scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.reward_shaping import (
    on_scale,
    rewards_at_step_ends,
    rewards_of_progress,
    rewards_spread_over_steps,
)
from megatron_rl.config.schema import Config, RewardEngine, RewardModelConfig, RewardModelKind, StepCredit
from megatron_rl.data.packing import unpack
from megatron_rl.data.samples import Sample, TrainingSequence
from megatron_rl.engine.scalar_model import ScalarModel
from megatron_rl.engine.step import forward_values
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.address import EngineLost
from megatron_rl.sync.engines import start_reward_server
from megatron_rl.trainer.training import Training

NAME = "model"
"""The term of the reward in samples and metrics: reward/model."""


class LearnedReward:
    """The reward model of a run."""

    def __init__(self, config: Config, groups: Groups, tokenizer: Any) -> None:
        """Load it.

        Raises:
            UserError: the folder holds no classifier of one label that fits.
        """
        self.config: RewardModelConfig = config.rewards.model
        self._values: Scorer = (ServerScorer if self.config.engine is RewardEngine.vllm else RankScorer)(config, groups)
        texts = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(len(tokenizer))]
        self._ends_step = np.array([self.config.step_separator in text for text in texts])

    def __call__(self, samples: Sequence[Sample], training: Training) -> list[Sample]:
        """The samples with the learned reward in their total and among their terms; collective.

        With a process model it is the sum over the tokens, and `token_rewards` of a sample says where they are.
        """
        ids = [(*sample.prompt.token_ids, *sample.completion.token_ids) for sample in samples]
        return [
            scored(sample, torch.from_numpy(values), self.config, self._ends_step)
            for sample, values in zip(samples, self._values(ids, training), strict=True)
        ]


def scored(sample: Sample, values: Tensor, config: RewardModelConfig, ends_step: np.ndarray) -> Sample:
    """A sample with its learned reward.

    Args:
        values: [tokens of prompt and completion] float32, the model's; of an outcome model the last is enough.
        config: of the reward model.
        ends_step: [vocabulary] bool: a token that ends a step. A completion's last one does anyway.
    """
    values = on_scale(values, config.scale.value)
    token_rewards = None
    if config.kind is RewardModelKind.process:
        ends = torch.from_numpy(ends_step[list(sample.completion.token_ids)])
        ends[-1] = True
        alone = torch.tensor([0, len(ends)], dtype=torch.int32)
        values = _CREDITS[config.credit](values[-len(ends) :], ends, torch.ones(len(ends)), alone)
        token_rewards = tuple((config.weight * values).tolist())
    score = float(values[-1] if token_rewards is None else values.sum())
    reward, terms = sample.reward + config.weight * score, sample.reward_terms | {NAME: score}
    return replace(sample, reward=reward, reward_terms=terms, token_rewards=token_rewards)


_CREDITS: dict[StepCredit, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    StepCredit.step_end: lambda scores, ends, mask, _: rewards_at_step_ends(scores, ends, mask),
    StepCredit.spread: rewards_spread_over_steps,
    StepCredit.progress: rewards_of_progress,
}
"""(scores, step ends, loss mask, cu_seqlens) -> rewards of the tokens."""

Scorer = Callable[[Sequence[tuple[int, ...]], Training], list[np.ndarray]]
"""(token ids of each sample, the run) -> values of each sample's tokens, on all ranks; collective."""


class RankScorer:
    """The model on the training ranks."""

    def __init__(self, config: Config, groups: Groups) -> None:
        settings, self.groups = config.rewards.model, groups
        self.model = ScalarModel(
            replace(config.model, hf_path=str(settings.hf_path), load_weights=True),
            groups,
            config.parallel,
            per_token=settings.kind is RewardModelKind.process,
            trained=False,
        )

    def __call__(self, ids: Sequence[tuple[int, ...]], training: Training) -> list[np.ndarray]:
        """See Scorer."""
        sequences = [_readable(of_sample) for of_sample in ids]
        batch = training.minibatch(sequences, range(len(sequences)))
        mine: dict[int, np.ndarray] = {}
        for micro_batch, values in zip(
            batch.micro_batches, forward_values(self.model, batch.micro_batches), strict=True
        ):
            mine |= {
                i: part.numpy() for i, part in zip(micro_batch.sequence_ids, unpack(values, micro_batch), strict=True)
            }
        of_ranks: list[dict[int, np.ndarray]] = [{}] * self.groups.dp.size()
        dist.all_gather_object(of_ranks, mine, group=self.groups.dp)
        scores = {i: values for of_rank in of_ranks for i, values in of_rank.items()}
        return [scores[i] for i in range(len(ids))]


class ServerScorer:
    """The model in a vLLM server of the first rank."""

    def __init__(self, config: Config, groups: Groups) -> None:
        self.groups, self.server = groups, None
        problem: list[EngineLost | None] = [None]
        if groups.world.rank() == 0:
            try:
                self.server = start_reward_server(config)
            except EngineLost as error:
                problem[0] = error
        dist.broadcast_object_list(problem, src=0, group=groups.world)
        if problem[0] is not None:
            raise problem[0]

    def __call__(self, ids: Sequence[tuple[int, ...]], training: Training) -> list[np.ndarray]:
        """See Scorer.

        Raises:
            EngineLost: on all ranks.
        """
        answer: list[Any] = [None]
        if self.server is not None:
            try:
                answer[0] = self.server.scores(ids)
            except EngineLost as error:
                answer[0] = error
        dist.broadcast_object_list(answer, src=0, group=self.groups.world)
        if isinstance(answer[0], EngineLost):
            raise answer[0]
        return list(answer[0])


def _readable(ids: tuple[int, ...]) -> TrainingSequence:
    """All tokens as positions: the last one is read too, so that its score is that of the whole."""
    return TrainingSequence(np.array([*ids, ids[-1]], dtype=np.int64), np.ones(len(ids), dtype=np.float32))
