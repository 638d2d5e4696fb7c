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

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config.errors import UserError
from ..config.schema import RewardFunctionConfig, RewardsConfig
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
        function = _find(settings.name, key)
        bound.append(BoundReward(settings.name, settings.weight, _bind(function, settings, key)))
    return bound


def cause(error: BaseException) -> str:
    """'Kind: message (file:line)' of an exception, the line being where it was raised."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"  # one line, whatever it was
    frames = traceback.extract_tb(error.__traceback__)
    return f"{message} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else message


def nearest(given: str, valid: list[str]) -> str:
    """'; did you mean ...?' if one of the valid names is near, and the list of all."""
    close = difflib.get_close_matches(given, valid, n=1)
    return f"{f'; did you mean {close[0]!r}?' if close else ';'} valid are {', '.join(valid) or 'none'}"


def _find(name: str, key: str) -> RewardFunction:
    if name in BUILT_INS:
        return BUILT_INS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        hint = nearest(name, list(BUILT_INS))
        raise RewardError(f"{key}.name: no built-in reward {name!r}{hint}, or a path 'package.module:function'")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file of the folder hides an installed package
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it runs
        raise RewardError(f"{key}.name: cannot import {module_name!r} of {name!r}: {cause(error)}") from error
    function = getattr(module, attribute, None)
    if function is None:
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise RewardError(f"{key}.name: module {module_name!r} has no {attribute!r}{nearest(attribute, functions)}")
    if not callable(function):
        raise RewardError(f"{key}.name: {name!r} is not a function but of type {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def _bind(function: RewardFunction, settings: RewardFunctionConfig, key: str) -> RewardFunction:
    """The function with its args, behind a call that drops the sample keywords it does not name."""
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError) as error:
        raise RewardError(f"{key}.name: {settings.name!r} does not tell its parameters: {error}") from error
    args = {str(name): value for name, value in settings.args.items()}
    named = {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = [n for n in named if n not in SAMPLE_KEYWORDS]
    for name in args:
        if name in SAMPLE_KEYWORDS:
            raise RewardError(f"{key}.args: {name!r} comes from the sample and cannot be set")
        if name not in own and not takes_all:
            raise RewardError(f"{key}.args: {settings.name!r} takes no argument {name!r}{nearest(name, own)}")
    for name, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise RewardError(f"{key}.name: {settings.name!r} takes {name!r} by position only; rewards get keywords")
        if name in own and name not in args and parameter.default is parameter.empty:
            raise RewardError(
                f"{key}.args: {settings.name!r} needs {name!r}, which is neither in args "
                f"nor one of {', '.join(SAMPLE_KEYWORDS)}"
            )
    wanted = SAMPLE_KEYWORDS if takes_all else tuple(n for n in SAMPLE_KEYWORDS if n in named)

    def call(**sample: Any) -> Any:
        return function(**{name: sample[name] for name in wanted}, **args)

    return call
