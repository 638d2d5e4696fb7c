"""The errors that a user's mistake raises.

Every room derives its own from `UserError` (`DataError`, `RewardError`, `CheckpointError`, ...). The command line
shows one as a single line and exits with code 2; any other exception is ours and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in what was given. The message is one line: what was given, what is allowed, the key or file."""


class ConfigError(UserError):
    """A configuration that cannot be run."""
