"""Functions that a configuration names: a built-in, or the user's own as 'package.module:function'.

A function gets what it names. Whoever calls it offers values by keyword (`offered`, say prompt and completion), the
configuration holds settings of its own (`settings`, say clip_low) and `args` of the user's; a parameter is filled from
the first of these that has its name. So a function of one's own has just the parameters that it needs, and a pure
function of `algorithms` is a built-in as it stands. All is checked when the function is bound, before anything runs.
"""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.errors import UserError

Function = Callable[..., Any]


@dataclass(frozen=True)
class Bound:
    """A function whose own arguments are settled."""

    name: str
    """As in the configuration."""
    function: Function
    wants: frozenset[str]
    """Which of the offered values it names."""
    arguments: Mapping[str, Any]
    """From settings and args."""

    def __call__(self, **offered: Any) -> Any:
        """Call it with those of the offered values that it names."""
        return self.function(**{name: offered[name] for name in self.wants}, **self.arguments)


def find_function(
    name: str, built_ins: Mapping[str, Function], *, key: str, what: str, error: type[UserError] = UserError
) -> Function:
    """The built-in of that name, or what the dotted path leads to; the current folder counts as importable.

    Args:
        key: of the configuration, for errors.
        what: what such a function is called, for errors: 'reward'.
        error: the kind of error to raise.

    Raises:
        UserError: an unknown name, a module or a function that cannot be had.
    """
    if name in built_ins:
        return built_ins[name]
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        hint = nearest(name, list(built_ins))
        raise error(f"{key}: no built-in {what} {name!r}{hint}, or a path 'package.module:function'")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file of the folder hides an installed package
    try:
        module = importlib.import_module(module_name)
    except Exception as failure:  # whatever a user's module raises while it runs
        raise error(f"{key}: cannot import {module_name!r} of {name!r}: {cause(failure)}") from failure
    function = getattr(module, attribute, None)
    if function is None:
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise error(f"{key}: module {module_name!r} has no {attribute!r}{nearest(attribute, functions)}")
    if not callable(function):
        raise error(f"{key}: {name!r} is not a function but of type {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def bind(
    name: str,
    function: Function,
    *,
    key: str,
    offered: Collection[str],
    args: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    error: type[UserError] = UserError,
) -> Bound:
    """Settle a function's arguments.

    Args:
        name, key: of the function in the configuration; `key`.name and `key`.args are what the user wrote.
        offered: names of the values that every call offers.
        args: the user's; each must be a parameter of the function.
        settings: values that the function gets where it names them.
        error: the kind of error to raise.

    Raises:
        UserError: an argument that the function does not take, or one that it needs and nobody gives.
    """
    settings = settings or {}
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError) as failure:
        raise error(f"{key}.name: {name!r} does not tell its parameters: {failure}") from failure
    args = {str(argument): value for argument, value in args.items()}
    named = {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = [n for n in named if n not in offered]
    for argument in args:
        if argument in offered:
            raise error(f"{key}.args: {argument!r} comes from the sample and cannot be set")
        if argument not in own and not takes_all:
            raise error(f"{key}.args: {name!r} takes no argument {argument!r}{nearest(argument, own)}")
    for argument, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise error(f"{key}.name: {name!r} takes {argument!r} by position only; it would get keywords")
        given = argument in args or argument in settings
        if argument in own and not given and parameter.default is parameter.empty:
            raise error(
                f"{key}.args: {name!r} needs {argument!r}, which is neither in args nor one of {', '.join(offered)}"
            )
    wanted = offered if takes_all else [n for n in offered if n in named]
    arguments = {n: value for n, value in settings.items() if n in own} | args
    return Bound(name, function, frozenset(wanted), arguments)


def cause(error: BaseException) -> str:
    """'Kind: message (file:line)' of an exception, the line being where it was raised."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"  # one line, whatever it was
    frames = traceback.extract_tb(error.__traceback__)
    return f"{message} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else message


def nearest(given: str, valid: list[str]) -> str:
    """'; did you mean ...?' if one of the valid names is near, and the list of all."""
    close = difflib.get_close_matches(given, valid, n=1)
    return f"{f'; did you mean {close[0]!r}?' if close else ';'} valid are {', '.join(valid) or 'none'}"
