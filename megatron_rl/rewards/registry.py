"""From a run's `rewards` settings to functions that can be called.

A reward is a plain function of keywords, called once per sample:

    def reward(*, prompt: str, completion: str, answer: str | None, row: dict, finish_reason: str, **args) -> float

It names what it wants of these five, and gets no more; one with **kwargs gets all. Its other parameters come from the
`args` of its settings. All of this is checked once, when the settings are resolved and before anything is generated.

    from the settings    a name of `BUILT_INS`, or 'package.module:function' (the current folder counts as importable)
    prompt, completion   text as the model saw and wrote it, without special tokens in the completion
    answer, row          the reference answer, and the whole row of the data file
    finish_reason        'stop' or 'length'
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config.errors import UserError
from ..config.functions import bind, find_function
from ..config.schema import RewardsConfig
from .answers import exact_match, numeric_answer
from .formats import final_answer_format, think_format

SAMPLE_KEYWORDS = ("prompt", "completion", "answer", "row", "finish_reason")

RewardFunction = Callable[..., Any]

BUILT_INS: dict[str, RewardFunction] = {
    "numeric_answer": numeric_answer,
    "exact_match": exact_match,
    "think_format": think_format,
    "final_answer_format": final_answer_format,
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
