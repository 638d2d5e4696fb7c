"""From completions to samples: every reward function on every completion.

A reward that fails stops the run with the sample's place in the data, since a silent 0 would be trained on.
"""

import math
from collections.abc import Sequence
from numbers import Real

from ..config.functions import cause
from ..data.samples import Completion, Prompt, Sample
from .registry import BoundReward, RewardError

SHOWN_CHARACTERS = 80
"""Of a completion, in an error message."""


def score(prompts: Sequence[Prompt], completions: Sequence[Completion], rewards: Sequence[BoundReward]) -> list[Sample]:
    """Scores completions[i], which was generated for prompts[i]; a prompt stands there once for each completion.

    The reward of a sample is the weighted sum of its terms. A term may be any finite real number, also a bool.

    Raises:
        RewardError: a function raised, or returned anything else; names the function, the row and the completion.
    """
    samples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        terms = {reward.name: _term(reward, prompt, completion) for reward in rewards}
        total = math.fsum(reward.weight * terms[reward.name] for reward in rewards)
        samples.append(Sample(prompt, completion, total, terms))
    return samples


def _term(reward: BoundReward, prompt: Prompt, completion: Completion) -> float:
    try:
        value = reward.call(
            prompt=prompt.text,
            completion=completion.text,
            answer=prompt.answer,
            row=prompt.row,
            finish_reason=completion.finish_reason,
        )
    except Exception as error:  # whatever a user's function raises
        raise _failure(reward, prompt, completion, f"raised {cause(error)}") from error
    # float first: isinstance of an abstract class is slow, and this runs for every sample
    if isinstance(value, float | Real):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond any float
            number = math.inf
        if math.isfinite(number):
            return number
    shown = repr(value)[:SHOWN_CHARACTERS]
    raise _failure(reward, prompt, completion, f"returned {shown} ({type(value).__name__}), not a finite number")


def _failure(reward: BoundReward, prompt: Prompt, completion: Completion, what: str) -> RewardError:
    text = completion.text
    beginning = repr(text[:SHOWN_CHARACTERS]) + (" ..." if len(text) > SHOWN_CHARACTERS else "")
    return RewardError(f"reward {reward.name!r} {what}; sample {prompt.source}, completion {beginning}")
