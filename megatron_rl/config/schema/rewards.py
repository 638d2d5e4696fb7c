"""Scores."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class RewardScale(Enum):
    """What becomes of the numbers that a reward model gives."""

    score = "score"
    probability = "probability"
    log_probability = "log_probability"


class RewardEngine(Enum):
    """What computes a learned reward: the training ranks, or a vLLM server."""

    megatron = "megatron"
    vllm = "vllm"


class RewardModelKind(Enum):
    """What a reward model scores: whole completions, or their steps."""

    outcome = "outcome"
    process = "process"


class StepCredit(Enum):
    """Which tokens a process reward goes to."""

    step_end = "step_end"
    spread = "spread"
    progress = "progress"


@dataclass
class RewardFunctionConfig:
    """One reward function."""

    name: str = MISSING
    """A built-in reward, or a dotted path 'package.module:function'."""
    weight: float = 1.0
    """Factor of this reward in the total."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments bound to the function."""


@dataclass
class RewardModelConfig:
    """A learned reward: a Hugging Face classifier of one label."""

    hf_path: str | None = None
    """Folder of a *ForSequenceClassification, or with kind process *ForTokenClassification; null: no learned reward."""
    kind: RewardModelKind = RewardModelKind.outcome
    """outcome: the score of a completion's last token. process: a score for each step, at its last token."""
    engine: RewardEngine = RewardEngine.megatron
    """megatron: the training ranks hold it beside the policy. vllm: a server that the first rank starts and asks."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """With engine vllm: further arguments of its server, by vLLM's names, e.g. gpu_memory_utilization; the others are
    those of rollout. It runs where the first rank does."""
    scale: RewardScale = RewardScale.score
    """The score itself, or, of a model that was trained on right and wrong, the probability of right or its logarithm.
    The logarithms of steps add up to that of all being right, which no further step can raise."""
    weight: float = 1.0
    """Factor of this reward in the total."""
    step_separator: str = "\n"
    """With kind process: a token whose text has this in it ends a step, as the last token does; '': every token."""
    credit: StepCredit = StepCredit.step_end
    """With kind process: a step's score goes to its last token (step_end), or in equal parts to all of them (spread);
    progress: its last token gets what the step changed, for a model that judges the answer so far."""


@dataclass
class OverlongConfig:
    """DAPO's soft punishment of length."""

    buffer_tokens: int | None = None
    """Over the last this many tokens below rollout.sampling.max_response_tokens it grows; null: no punishment."""
    penalty: float = 1.0
    """Taken off the reward of a completion of full length."""


@dataclass
class RewardsConfig:
    """Scores of completions; the total is the weighted sum."""

    functions: list[RewardFunctionConfig] = field(default_factory=list)
    """The reward functions."""
    num_workers: int = 2
    """Processes of each engine for functions of your own; 0 calls them in the rank, where nothing limits them."""
    timeout_seconds: float = 60.0
    """Limit of one call; a function that takes longer loses its sample."""
    memory_gigabytes: float = 4.0
    """Limit of a process's data; a function that needs more loses its sample."""
    lost_value: float = 0.0
    """Value of a reward that was lost. How many were is shown as reward/lost."""
    unreadable_references: float = 0.0
    """Share of the rows whose reference answer math_answer need not be able to read; more stop the run at its start."""
    model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """A learned reward."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    """Punishment of length."""
