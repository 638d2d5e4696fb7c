"""The errors that a user's mistake raises.

Every room derives its own from `UserError` (`DataError`, `RewardError`, `CheckpointError`, ...). The command line
shows one as a single line and exits with code 2; any other exception is ours and keeps its traceback. `Interrupted` is
no error: a scheduler wants its nodes back.
"""

from enum import Enum
from typing import NoReturn


class UserError(ValueError):
    """A mistake in what was given. The message is one line: what was given, what is allowed, the key or file."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


def shown(value: object) -> str:
    """A given value as error messages show it: one line, not long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def refuse(key: str, given: object, allowed: str) -> NoReturn:
    """Raise ConfigError: the dotted key, what was given, what is allowed."""
    value = given.value if isinstance(given, Enum) else shown(given)
    raise ConfigError(f"{key}: given {value}, allowed: {allowed}")


EXIT_RESUME = 75
"""Exit code of a run that was told to stop, saved its state, and wants to be started again (EX_TEMPFAIL)."""

EXIT_HANG = 70
"""Exit code of a rank whose watchdog ended it; it has said who waits for whom."""


class Interrupted(Exception):
    """The run was told to stop and its state is saved. The message says at which step and by what."""
