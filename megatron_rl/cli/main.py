"""`megatron-rl`: parse, run one command, and tell a user's mistake from ours.

Each command is a module with `add_parser(subparsers)`, whose parser carries `run(arguments) -> exit code`. Modules
import torch, Megatron and vLLM inside `run`, so that help and errors come at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_rl import __version__
from megatron_rl.cli import convert, doctor, evaluate, plan, quantize, report, train
from megatron_rl.config.errors import UserError

USER_ERROR = 2
"""Exit code of a user's mistake, which is also argparse's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the process's own if `argv` is None.

    Returns:
        The exit code. A user's mistake is one line on stderr and code 2; any other exception is ours and is raised.
    """
    # Read by torch and transformers when they are imported, which is later: notices that no user can act on.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"megatron-rl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-rl", description="RL post-training of Megatron-Core models.")
    parser.add_argument("--version", action="version", version=f"megatron-rl {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, evaluate, convert, quantize, plan, report, doctor):
        command.add_parser(subparsers)
    return parser
