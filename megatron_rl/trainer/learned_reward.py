"""A learned reward: a classifier scores what the engines wrote, on the training ranks or in a vLLM server.

It reads prompt and completion as token ids, the end-of-sequence token included if it was sampled. An outcome model's
score is that of the last token; a process model's are those of the last tokens of the steps, and each is the reward of
that token. On the training ranks rows are laid out as for training, so every rank scores its share; a server is asked
by the first rank. All ranks learn the scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.algorithms.reward_shaping import on_scale
from megatron_rl.config.schema import Config, RewardEngine, RewardModelConfig, RewardModelKind
from megatron_rl.data.packing import unpack
from megatron_rl.data.samples import Sample, TrainingSequence
from megatron_rl.engine.scalar_model import ScalarModel
from megatron_rl.engine.step import forward_values
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.address import EngineLost
from megatron_rl.trainer.engines import start_reward_server
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
        self._values: Scorer = (OfServer if self.config.engine is RewardEngine.vllm else OfRanks)(config, groups)
        texts = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(len(tokenizer))]
        self._ends_step = np.array([self.config.step_separator in text for text in texts])

    def __call__(self, samples: Sequence[Sample], training: Training) -> list[Sample]:
        """The samples with the learned reward in their total and among their terms; collective.

        With a process model it is the sum over the steps, and `token_rewards` of a sample says where they are.
        """
        ids = [(*sample.prompt.token_ids, *sample.completion.token_ids) for sample in samples]
        scores = [on_scale(torch.from_numpy(v), self.config.scale.value).numpy() for v in self._values(ids, training)]
        return [self._scored(sample, values) for sample, values in zip(samples, scores, strict=True)]

    def _scored(self, sample: Sample, values: np.ndarray) -> Sample:
        """Args: values: [tokens of prompt and completion]; of an outcome model the last is enough."""
        weight, num_prompt = self.config.weight, len(sample.prompt.token_ids)
        if self.config.kind is RewardModelKind.outcome:
            score = float(values[-1])
            terms = sample.reward_terms | {NAME: score}
            return replace(sample, reward=sample.reward + weight * score, reward_terms=terms)
        ends = self._ends_step[list(sample.completion.token_ids)]
        ends[-1] = True
        of_tokens = np.where(ends, values[num_prompt:], 0.0).astype(np.float32)
        score = float(of_tokens.sum())
        return replace(
            sample,
            reward=sample.reward + weight * score,
            reward_terms=sample.reward_terms | {NAME: score},
            token_rewards=tuple((weight * of_tokens).tolist()),
        )


Scorer = Callable[[Sequence[tuple[int, ...]], Training], list[np.ndarray]]
"""(token ids of each sample, the run) -> values of each sample's tokens, on all ranks; collective."""


class OfRanks:
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
        for row, values in zip(batch.rows, forward_values(self.model, batch.rows), strict=True):
            mine |= {i: part.numpy() for i, part in zip(row.sequence_ids, unpack(values, row), strict=True)}
        of_ranks: list[dict[int, np.ndarray]] = [{}] * self.groups.dp.size()
        dist.all_gather_object(of_ranks, mine, group=self.groups.dp)
        scores = {i: values for of_rank in of_ranks for i, values in of_rank.items()}
        return [scores[i] for i in range(len(ids))]


class OfServer:
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
