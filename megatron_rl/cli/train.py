"""`megatron-rl train CONFIG [key=value ...]`: train, or go on with a run that was interrupted."""

import argparse
from typing import Any

from megatron_rl.cli.start import Work, add_config_arguments, start


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "train",
        help="train; the same command again resumes",
        description="Train. Inside torchrun or srun this process is one rank; elsewhere the layout's ranks are "
        "started on this machine.",
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    return start(arguments, _import_train, command="train", evaluates=False)


def _import_train() -> Work:
    from megatron_rl.trainer.run import train

    return train
