"""The commands that work on files: `convert`, `quantize` and `report`.

convert   between a Hugging Face checkpoint and a Megatron one. The latter is stored independently of the layout
          that wrote it, so no parallel sizes are asked for
quantize  a trained policy as a quantised checkpoint for vLLM
report    one HTML page about a run, finished or not
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_rl.cli.rank_environment import free_port, rank_of_this_machine
from megatron_rl.config.errors import UserError
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import QuantizedFormat

_VERIFY = "compare log-probs of a few prompts between transformers and Megatron, and print the largest difference"


def add_convert_parser(subparsers: Any) -> None:
    """Add `convert`, with a parser of its own for each direction."""
    parser = subparsers.add_parser("convert", help="convert checkpoints: Hugging Face <-> Megatron")
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")

    to_megatron = directions.add_parser("hf-to-megatron", help="Hugging Face folder -> Megatron checkpoint")
    to_megatron.add_argument("--hf-path", type=Path, required=True, help="folder of a Hugging Face checkpoint")
    to_megatron.add_argument("--output", type=Path, required=True, help="folder of the Megatron checkpoint to write")
    to_megatron.add_argument("--verify", action="store_true", help=_VERIFY)
    to_megatron.set_defaults(run=_hf_to_megatron)

    to_hf = directions.add_parser("megatron-to-hf", help="Megatron checkpoint -> Hugging Face folder")
    to_hf.add_argument("--checkpoint", type=Path, required=True, help="folder of a Megatron checkpoint")
    to_hf.add_argument("--hf-path", type=Path, required=True, help="checkpoint whose config and tokenizer are copied")
    to_hf.add_argument("--output", type=Path, required=True, help="folder of the Hugging Face checkpoint to write")
    to_hf.add_argument("--verify", action="store_true", help=_VERIFY)
    to_hf.set_defaults(run=_megatron_to_hf)


def _hf_to_megatron(arguments: argparse.Namespace) -> int:
    from megatron_rl.checkpoint.convert import hf_to_megatron

    _print_difference(hf_to_megatron(hf_path=arguments.hf_path, output=arguments.output, verify=arguments.verify))
    return 0


def _megatron_to_hf(arguments: argparse.Namespace) -> int:
    from megatron_rl.checkpoint.convert import megatron_to_hf

    _print_difference(
        megatron_to_hf(
            checkpoint=arguments.checkpoint,
            hf_path=arguments.hf_path,
            output=arguments.output,
            verify=arguments.verify,
        )
    )
    return 0


def _print_difference(difference: float | None) -> None:
    if difference is not None:
        print(f"largest difference between transformers and Megatron: {difference:.3g} (log-probs: nats)")


def add_quantize_parser(subparsers: Any) -> None:
    """Add `quantize`."""
    parser = subparsers.add_parser(
        "quantize",
        help="quantise a trained policy",
        description="Write a run's exported policy with quantised weights, in the layout of compressed-tensors, which "
        "vLLM and transformers load. Prints how far log-probs of the run's prompts moved, as JSON.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="of the run; its prompts are the calibration data")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    # fp8_block is for engines: its blocks lie across the rows that training interleaves, so the effect is not measured.
    formats = [format.value for format in QuantizedFormat if format is not QuantizedFormat.fp8_block]
    parser.add_argument("--format", required=True, choices=formats)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--hf-path", type=Path, help="checkpoint to quantise; default: the run's hf/")
    parser.add_argument("--num-prompts", type=int, default=128, help="training prompts to calibrate on")
    parser.set_defaults(run=_quantize)


def _quantize(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    os.environ.update(rank_of_this_machine(0, 1, free_port()))
    from megatron_rl.trainer.quantize import quantize

    moved = quantize(
        config,
        format=QuantizedFormat(arguments.format),
        output=arguments.output,
        hf_path=arguments.hf_path,
        num_prompts=arguments.num_prompts,
    )
    print(json.dumps(moved, indent=2))
    return 0


def add_report_parser(subparsers: Any) -> None:
    """Add `report`."""
    parser = subparsers.add_parser("report", help="write report.html about a run")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run, for example runs/NAME")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    if not (arguments.run_dir / "config.yaml").is_file():
        raise UserError(f"RUN_DIR: given '{arguments.run_dir}', allowed: the folder of a run, which has a config.yaml")
    from megatron_rl.report.report import write_report

    print(write_report(arguments.run_dir))
    return 0
