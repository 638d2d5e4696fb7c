"""A learned reward: a classifier on the training ranks scores what the engines wrote.

It reads prompt and completion as token ids, the end-of-sequence token included if it was sampled. An outcome model's
score is that of the last token; a process model's are those of the last tokens of the steps, and each is the reward of
that token. Rows are laid out as for training, so every rank scores its share, and all learn the scores.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_rl.config.schema import Config, RewardModelConfig, RewardModelKind
from megatron_rl.data.packing import unpack
from megatron_rl.data.samples import Sample, TrainingSequence
from megatron_rl.engine.scalar_model import ScalarModel
from megatron_rl.engine.step import forward_values
from megatron_rl.parallel.groups import Groups
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
        assert self.config.hf_path is not None
        self.model = ScalarModel(
            replace(config.model, hf_path=str(Path(self.config.hf_path)), load_weights=True),
            groups,
            config.parallel,
            per_token=self.config.kind is RewardModelKind.process,
            trained=False,
        )
        self.groups = groups
        texts = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(len(tokenizer))]
        self._ends_step = np.array([self.config.step_separator in text for text in texts])

    def __call__(self, samples: Sequence[Sample], training: Training) -> list[Sample]:
        """The samples with the learned reward in their total and among their terms; collective.

        With a process model it is the sum over the steps, and `token_rewards` of a sample says where they are.
        """
        sequences = [_readable(sample) for sample in samples]
        batch = training.minibatch(sequences, range(len(sequences)))
        mine: dict[int, np.ndarray] = {}
        for row, values in zip(batch.rows, forward_values(self.model, batch.rows), strict=True):
            mine |= {i: part.numpy() for i, part in zip(row.sequence_ids, unpack(values, row), strict=True)}
        of_ranks: list[dict[int, np.ndarray]] = [{}] * self.groups.dp.size()
        dist.all_gather_object(of_ranks, mine, group=self.groups.dp)
        scores = {i: values for of_rank in of_ranks for i, values in of_rank.items()}
        return [self._scored(sample, scores[i]) for i, sample in enumerate(samples)]

    def _scored(self, sample: Sample, values: np.ndarray) -> Sample:
        """Args: values: [tokens of prompt and completion]."""
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


def _readable(sample: Sample) -> TrainingSequence:
    """All tokens as positions: the last one is read too, so that its score is that of the whole."""
    ids = (*sample.prompt.token_ids, *sample.completion.token_ids)
    return TrainingSequence(np.array([*ids, ids[-1]], dtype=np.int64), np.ones(len(ids), dtype=np.float32))
