"""From completions to samples: every reward function on every completion.

A reward that fails stops the run with the sample's place in the data, since a silent 0 would be trained on. One that
hangs or eats memory, in a pool, loses its sample alone, which is counted.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..config.functions import cause
from ..data.samples import Completion, Prompt, Sample
from .pool import Outcome, RewardPool
from .registry import BoundReward, RewardError

SHOWN_CHARACTERS = 80
"""Of a completion, in an error message."""


def score(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    rewards: Sequence[BoundReward],
    *,
    pool: RewardPool | None = None,
    lost_value: float = 0.0,
) -> list[Sample]:
    """Scores completions[i], which was generated for prompts[i]; a prompt stands there once for each completion.

    The reward of a sample is the weighted sum of its terms. A term may be any finite real number, also a bool.

    Args:
        pool: runs functions of the user's own; None: they run here.
        lost_value: the term of a function that the pool had to end.

    Raises:
        RewardError: a function raised, or returned anything else; names the function, the row and the completion.
    """
    pairs = list(zip(prompts, completions, strict=True))
    outcomes = [_outcomes(reward, pairs, pool) for reward in rewards]
    samples = []
    for number, (prompt, completion) in enumerate(pairs):
        terms, lost = {}, []
        for reward, of_reward in zip(rewards, outcomes, strict=True):
            outcome = of_reward[number]
            if outcome.lost is not None:
                lost.append(f"{reward.name}: {outcome.lost}")
                terms[reward.name] = lost_value
            else:
                terms[reward.name] = _number(outcome, reward, prompt, completion)
        total = math.fsum(reward.weight * terms[reward.name] for reward in rewards)
        samples.append(Sample(prompt, completion, total, terms, lost=tuple(lost)))
    return samples


def _outcomes(
    reward: BoundReward, pairs: Sequence[tuple[Prompt, Completion]], pool: RewardPool | None
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
        return pool.call(reward.call, keywords)
    return [_called(reward, sample) for sample in keywords]


def _called(reward: BoundReward, sample: dict[str, Any]) -> Outcome:
    try:
        value = reward.call(**sample)
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises
        return Outcome(raised=cause(error), error=error)
    # float first: isinstance of an abstract class is slow, and this runs for every sample
    if isinstance(value, float | Real):
        try:
            return Outcome(value=float(value))
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
