"""The samples of one step, collected over one round of generation, or over several.

Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): a prompt whose completions all have the same reward teaches
nothing, so it is replaced by another one, until the batch is full or the rounds are spent. What is missing then is
filled with such prompts, so that a step always has its size, and a run cannot hang on data that is too easy.
"""

from collections.abc import Sequence

import torch

from megatron_rl.algorithms.advantages import informative
from megatron_rl.data.samples import Sample


class Collection:
    """Groups of samples, one per prompt, on their way to a full batch."""

    def __init__(self, num_prompts: int, max_rounds: int) -> None:
        """Args:
        num_prompts: of a full batch.
        max_rounds: of generation; with 1 every group is kept.
        """
        self.num_prompts, self.max_rounds = num_prompts, max_rounds
        self.num_rounds = 0
        self._kept: list[Sequence[Sample]] = []
        self._spare: list[Sequence[Sample]] = []

    @property
    def num_missing(self) -> int:
        """Prompts to draw in the next round; 0: the batch is complete."""
        return 0 if self.num_rounds == self.max_rounds else self.num_prompts - len(self._kept)

    def add(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Take in one round's samples, by prompt."""
        self.num_rounds += 1
        for group in groups:
            (self._kept if self.max_rounds == 1 or _has_contrast(group) else self._spare).append(group)

    @property
    def samples(self) -> list[Sample]:
        """Those of a complete batch."""
        groups = [*self._kept, *self._spare][: self.num_prompts]
        return [sample for group in groups for sample in group]

    def metrics(self) -> dict[str, float]:
        """sampling/rounds, and sampling/kept_fraction: drawn prompts with contrast; {} without dynamic sampling."""
        if self.max_rounds == 1:
            return {}
        drawn = len(self._kept) + len(self._spare)
        return {"sampling/rounds": self.num_rounds, "sampling/kept_fraction": len(self._kept) / drawn}


def _has_contrast(group: Sequence[Sample]) -> bool:
    rewards = torch.tensor([sample.reward for sample in group])
    return bool(informative(rewards, torch.zeros(len(group), dtype=torch.int64)).any())
