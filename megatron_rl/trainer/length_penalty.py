"""DAPO's punishment of long completions, as one more term of the reward."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rl.algorithms.reward_shaping import overlong_penalty
from megatron_rl.config.schema import OverlongConfig
from megatron_rl.data.samples import Sample

NAME = "overlong"
"""The term of the punishment in samples and metrics: reward/overlong."""


def punish_length(samples: Sequence[Sample], config: OverlongConfig, *, max_tokens: int) -> list[Sample]:
    """The samples with DAPO's punishment of length in their rewards; as they are without one.

    Args:
        max_tokens: limit of a completion.
    """
    if config.buffer_tokens is None:
        return list(samples)
    lengths = torch.tensor([len(sample.completion.token_ids) for sample in samples])
    terms = overlong_penalty(lengths, max_tokens=max_tokens, buffer_tokens=config.buffer_tokens).tolist()
    return [
        replace(sample, reward=sample.reward + config.penalty * term, reward_terms=sample.reward_terms | {NAME: term})
        for sample, term in zip(samples, terms, strict=True)
    ]
