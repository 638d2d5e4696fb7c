"""`megatron-rl`: parse, run one command, and tell a user's mistake from ours.

Each command has a function that adds its parser, which carries `run(arguments) -> exit code`. Torch, Megatron and vLLM
are imported inside `run`, so that help and errors come at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_rl import __version__
from megatron_rl.cli import commands, doctor, launch_slurm, plan, rewards, train
from megatron_rl.cli.rank_environment import tell_exit_code
from megatron_rl.config.errors import EXIT_RESUME, Interrupted, UserError

USER_ERROR = 2
"""Exit code of a user's mistake, which is also argparse's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the process's own if `argv` is None.

    Returns:
        The exit code. A user's mistake is one line on stderr and code 2; a run that was told to stop and has saved its
        state, `EXIT_RESUME`; any other exception is ours and is raised.
    """
    # Read by torch and transformers when they are imported, which is later: notices that no user can act on.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = _parse(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"megatron-rl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return tell_exit_code(USER_ERROR)
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-rl: {interrupted}; the same command goes on from there", file=sys.stderr)
        return tell_exit_code(EXIT_RESUME)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; `key=value` may stand before and after options, which argparse alone refuses."""
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    unknown = left if not hasattr(arguments, "overrides") else [word for word in left if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if left:
        arguments.overrides += left
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-rl", description="RL post-training of Megatron-Core models.")
    parser.add_argument("--version", action="version", version=f"megatron-rl {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_parser in (
        train.add_train_parser,
        train.add_evaluate_parser,
        launch_slurm.add_parser,
        commands.add_convert_parser,
        commands.add_quantize_parser,
        plan.add_parser,
        commands.add_report_parser,
        rewards.add_parser,
        doctor.add_parser,
    ):
        add_parser(subparsers)
    return parser
