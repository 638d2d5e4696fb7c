"""Reward functions: from a run's `rewards` settings to functions, and from completions to scored samples.

A reward is a plain function of keywords, called once per sample:

    def reward(*, prompt: str, completion: str, answer: str | None, row: dict, finish_reason: str, **args) -> float

(or a `Score`, a float with notes that are logged and counted).

It names what it wants of these five, and gets no more; one with **kwargs gets all. Its other parameters come from the
`args` of its settings. All of this is checked once, when the settings are resolved and before anything is generated.

    from the settings    a name of `BUILT_INS`, or 'package.module:function' (the current folder counts as importable)
    prompt, completion   text as the model saw and wrote it, without special tokens in the completion
    answer, row          the reference answer, and the whole row of the data file
    finish_reason        'stop' or 'length'

A reward that fails stops the run with the sample's place in the data, since a silent 0 would be trained on. One that
hangs or eats memory, in a pool, loses its sample alone, which is counted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.config.functions import bind, cause, find_function
from megatron_rl.config.schema import RewardsConfig
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.rewards.answers import exact_match, numeric_answer
from megatron_rl.rewards.formats import (
    boxed_format,
    dapo_format,
    final_answer_format,
    json_schema,
    r1_format,
    think_format,
)
from megatron_rl.rewards.instructions import instructions
from megatron_rl.rewards.mathematics.reward import math_answer
from megatron_rl.rewards.pool import Outcome, RewardPool
from megatron_rl.rewards.prose import language, length, repetition

SAMPLE_KEYWORDS = ("prompt", "completion", "answer", "row", "finish_reason")

RewardFunction = Callable[..., Any]

BUILT_INS: dict[str, RewardFunction] = {
    "numeric_answer": numeric_answer,
    "math_answer": math_answer,
    "exact_match": exact_match,
    "think_format": think_format,
    "final_answer_format": final_answer_format,
    "boxed_format": boxed_format,
    "r1_format": r1_format,
    "dapo_format": dapo_format,
    "json_schema": json_schema,
    "instructions": instructions,
    "length": length,
    "language": language,
    "repetition": repetition,
}


class RewardError(UserError):
    """A reward that cannot be resolved, or that failed on a sample."""


@dataclass(frozen=True)
class BoundReward:
    """A reward function with its weight and arguments."""

    name: str
    """As in the settings; the name of its term in the metrics."""
    weight: float
    """Factor of this reward in the total."""
    call: RewardFunction
    """Takes the five sample keywords and hands on those that the function names."""

    @property
    def is_users(self) -> bool:
        """Whether it is a function of the user's own, found by its path; what is built in ends by itself."""
        return ":" in self.name


def resolve_rewards(config: RewardsConfig) -> list[BoundReward]:
    """The reward functions of a run, in the order of the settings.

    Raises:
        RewardError: an unknown name, a module or function that cannot be had, arguments that do not fit, a name twice.
    """
    bound: list[BoundReward] = []
    for number, settings in enumerate(config.functions):
        key = f"rewards.functions[{number}]"
        if any(settings.name == other.name for other in bound):
            raise RewardError(f"{key}.name: {settings.name!r} is given twice; the terms of a reward go by their names")
        function = find_function(settings.name, BUILT_INS, key=f"{key}.name", what="reward", error=RewardError)
        call = bind(settings.name, function, key=key, offered=SAMPLE_KEYWORDS, args=settings.args, error=RewardError)
        bound.append(BoundReward(settings.name, settings.weight, call))
    return bound


SHOWN_CHARACTERS = 80
"""Of a completion, in an error message."""


def score(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    rewards: Sequence[BoundReward],
    *,
    pool: RewardPool | None = None,
    lost_value: float = 0.0,
    on_progress: Callable[[], object] = lambda: None,
) -> list[Sample]:
    """Scores completions[i], which was generated for prompts[i]; a prompt stands there once for each completion.

    The reward of a sample is the weighted sum of its terms. A term may be any finite real number, also a bool.

    Args:
        pool: runs functions of the user's own; None: they run here.
        lost_value: the term of a function that the pool had to end.
        on_progress: called after every sample that a function has scored.

    Raises:
        RewardError: a function raised, or returned anything else; names the function, the row and the completion.
    """
    pairs = list(zip(prompts, completions, strict=True))
    outcomes = [_outcomes(reward, pairs, pool, on_progress) for reward in rewards]
    samples = []
    for number, (prompt, completion) in enumerate(pairs):
        terms, notes, lost = {}, {}, []
        for reward, of_reward in zip(rewards, outcomes, strict=True):
            outcome = of_reward[number]
            if outcome.lost is not None:
                lost.append(f"{reward.name}: {outcome.lost}")
                terms[reward.name] = lost_value
            else:
                terms[reward.name] = _number(outcome, reward, prompt, completion)
                if outcome.notes:
                    notes[reward.name] = outcome.notes
        total = math.fsum(reward.weight * terms[reward.name] for reward in rewards)
        samples.append(Sample(prompt, completion, total, terms, notes=notes, lost=tuple(lost)))
    return samples


def _outcomes(
    reward: BoundReward,
    pairs: Sequence[tuple[Prompt, Completion]],
    pool: RewardPool | None,
    on_progress: Callable[[], object],
) -> Sequence[Outcome]:
    """What the function makes of each sample."""
    keywords = [
        dict(
            prompt=prompt.text,
            completion=completion.text,
            answer=prompt.answer,
            row=prompt.row,
            finish_reason=completion.finish_reason,
        )
        for prompt, completion in pairs
    ]
    if pool is not None and reward.is_users:
        return pool.call(reward.call, keywords, on_progress)
    outcomes = []
    for sample in keywords:
        outcomes.append(_called(reward, sample))
        on_progress()
    return outcomes


def _called(reward: BoundReward, sample: dict[str, Any]) -> Outcome:
    try:
        value = reward.call(**sample)
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises
        return Outcome(raised=cause(error), error=error)
    # float first: isinstance of an abstract class is slow, and this runs for every sample
    if not isinstance(value, float | Real) and getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = value.item()
    if isinstance(value, float | Real):
        try:
            return Outcome(value=float(value), notes=getattr(value, "notes", {}))
        except OverflowError:  # an integer beyond any float
            pass
    return Outcome(returned=f"{repr(value)[:SHOWN_CHARACTERS]} ({type(value).__name__})")


def _number(outcome: Outcome, reward: BoundReward, prompt: Prompt, completion: Completion) -> float:
    """The value of an outcome."""
    if outcome.raised is not None:
        raise _failure(reward, prompt, completion, f"raised {outcome.raised}") from outcome.error
    if outcome.returned is None and math.isfinite(outcome.value):
        return float(outcome.value)
    shown = outcome.returned or f"{outcome.value!r} (float)"
    raise _failure(reward, prompt, completion, f"returned {shown}, not a finite number")


def _failure(reward: BoundReward, prompt: Prompt, completion: Completion, what: str) -> RewardError:
    text = completion.text
    beginning = repr(text[:SHOWN_CHARACTERS]) + (" ..." if len(text) > SHOWN_CHARACTERS else "")
    return RewardError(f"reward {reward.name!r} {what}; sample {prompt.source}, completion {beginning}")
