"""`megatron-rl report RUN_DIR`: one HTML page about a run, finished or not."""

import argparse
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("report", help="write report.html about a run")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run, for example runs/NAME")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if not (arguments.run_dir / "config.yaml").is_file():
        raise UserError(f"RUN_DIR: given '{arguments.run_dir}', allowed: the folder of a run, which has a config.yaml")
    from megatron_rl.report.report import write_report

    print(write_report(arguments.run_dir))
    return 0
