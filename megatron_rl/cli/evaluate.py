"""`megatron-rl evaluate CONFIG [key=value ...]`: the held-out metrics of a policy, as JSON on stdout."""

import argparse
import json
import os
from typing import Any

from megatron_rl.cli.start import Work, add_config_arguments, start
from megatron_rl.config.schema import Config
from megatron_rl.placement.layout import Layout


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "evaluate", help="evaluate on data.eval", description="Evaluate a policy on data.eval; ranks start as in train."
    )
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    return start(arguments, _import_evaluate, command="evaluate", evaluates=True)


def _import_evaluate() -> Work:
    from megatron_rl.trainer.run import evaluate

    def evaluate_and_print(config: Config, layout: Layout) -> None:
        metrics = evaluate(config, layout)
        if os.environ["RANK"] == "0":
            print(json.dumps(metrics, indent=2))

    return evaluate_and_print
