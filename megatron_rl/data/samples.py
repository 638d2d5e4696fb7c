"""The nouns that travel through a run: prompts, completions, samples, training sequences.

A `Prompt` comes from a dataset, an engine turns it into `Completion`s, a reward turns prompt and completion into a
`Sample`, and the objective turns samples into `TrainingSequence`s, which `packing` lays out in micro-batches. Token ids
are never decoded and encoded again: what was sampled is what is trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt dataset, tokenised."""

    prompt_id: int
    """Row number in the file. Completions of equal prompt_id form a group."""
    token_ids: tuple[int, ...]
    """Tokens of the rendered prompt."""
    text: str
    """The rendered prompt."""
    answer: str | None
    """Reference answer for the rewards."""
    source: str
    """'file:line', for error messages."""
    row: dict[str, Any] = field(default_factory=dict)
    """The whole row of the file, for custom rewards."""


@dataclass(frozen=True)
class Completion:
    """What an engine generated for one prompt."""

    token_ids: tuple[int, ...]
    """Generated tokens, including the end-of-sequence token if one was sampled."""
    log_probs: tuple[float, ...]
    """Log-probability, nats, of each generated token under the engine at the sampling temperature."""
    text: str
    """The decoded tokens, without special tokens."""
    finish_reason: str
    """'stop' (end of sequence or stop string) or 'length' (cut)."""
    weight_version: int
    """Version of the policy's weights that generated it."""
    routes: NDArray[np.integer[Any]] | None = None
    """[prompt + generated - 1, layers with experts, topk]: the experts that the engine sent each token to, of every
    position that predicts one; None: not recorded."""


@dataclass(frozen=True)
class Sample:
    """A scored completion."""

    prompt: Prompt
    completion: Completion
    reward: float
    """Weighted sum of all rewards."""
    reward_terms: dict[str, float]
    """Unweighted value of each reward, by name."""
    token_rewards: tuple[float, ...] | None = None
    """What single tokens of the completion earned, of a process reward; their sum is part of `reward`."""
    notes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What rewards say beside their value, by name: the verdict, and what was extracted."""
    lost: tuple[str, ...] = ()
    """Why rewards could not be computed: a function that took too long, too much memory, or crashed."""

    @property
    def terminal_reward(self) -> float:
        """What the completion earned as a whole."""
        return self.reward - sum(self.token_rewards or ())


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence of a training batch, in label coordinates.

    `token_ids` has L + 1 tokens: position t in [0, L) reads token_ids[t] and predicts token_ids[t + 1]. Every other
    per-token array has L entries aligned with the predicted token.
    """

    token_ids: NDArray[np.int64]
    """[L + 1] tokens of prompt and response."""
    loss_mask: NDArray[np.float32]
    """[L] 1 where the predicted token is trained on, else 0."""
    per_token: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """[L] each: `advantages`, `rollout_log_probs`, `old_log_probs`, `ref_log_probs`, ..."""

    @property
    def num_positions(self) -> int:
        """L, the number of positions that the model computes."""
        return len(self.token_ids) - 1
