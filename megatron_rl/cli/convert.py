"""`megatron-rl convert`: between a Hugging Face checkpoint and a Megatron one, in either direction.

A Megatron checkpoint is stored independently of the layout that wrote it, so no parallel sizes are asked for.
"""

import argparse
from pathlib import Path
from typing import Any

_VERIFY = "compare log-probs of a few prompts between transformers and Megatron, and print the largest difference"


def add_parser(subparsers: Any) -> None:
    """Add the command's parser, with one of its own for each direction."""
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

    _report(hf_to_megatron(hf_path=arguments.hf_path, output=arguments.output, verify=arguments.verify))
    return 0


def _megatron_to_hf(arguments: argparse.Namespace) -> int:
    from megatron_rl.checkpoint.convert import megatron_to_hf

    _report(
        megatron_to_hf(
            checkpoint=arguments.checkpoint,
            hf_path=arguments.hf_path,
            output=arguments.output,
            verify=arguments.verify,
        )
    )
    return 0


def _report(difference: float | None) -> None:
    if difference is not None:
        print(f"largest difference between transformers and Megatron: {difference:.3g} (log-probs: nats)")
