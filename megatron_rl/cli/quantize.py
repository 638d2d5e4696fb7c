"""`megatron-rl quantize CONFIG --format F --output DIR`: a trained policy as a quantised checkpoint for vLLM."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_rl.cli.rank_environment import free_port, rank_of_this_machine
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import QuantizedFormat


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
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
