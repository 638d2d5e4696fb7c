"""`megatron-rl doctor`: what is installed, what it unlocks, what fails without the rest, and what a run takes.

`megatron-rl doctor --interfaces`: whether the installed releases have what this package calls, see `interfaces`.

`megatron-rl doctor RUN_DIR`: what happened to a run that is dead or hangs.

Versions come from the packages' metadata; only torch is imported, to see the devices.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import AdamImplementation, ModelConfig
from megatron_rl.models.capabilities import LIBRARIES, capabilities, installed_version
from megatron_rl.models.choices import choose
from megatron_rl.runs.diagnosis import diagnosis
from megatron_rl.runs.directory import RunDirectory


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("doctor", help="what is installed, and what it unlocks")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, nargs="?", help="a run that is dead or hangs")
    parser.add_argument("--interfaces", action="store_true", help="look up what is called of the installed releases")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 1 if a required library is absent."""
    if arguments.run_dir is not None:
        return _examine(arguments.run_dir)
    if arguments.interfaces:
        return _compare_interfaces()
    rows = [("python", platform.python_version(), ""), *devices()]
    failures = 0
    for library in LIBRARIES:
        version = installed_version(library)
        rows.append((library.name, version or "absent", library.unlocks if version else library.without))
        failures += library.required and version is None
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, state, meaning in rows:
        print(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {meaning}".rstrip())
    if not failures:
        print(f"\na run here takes: {choose(capabilities(), ModelConfig(), AdamImplementation.auto)}")
    return 1 if failures else 0


def _compare_interfaces() -> int:
    import megatron_rl.device  # noqa: F401  (core's modules find the device that they run on)
    from megatron_rl.cli.interfaces import problems
    from megatron_rl.rollout.isolation import isolated  # imports torch, which no other command waits for

    with isolated():
        count, found = problems()
    print("\n".join([*found, f"{count} interfaces looked up, {len(found)} of them are not as this package calls them"]))
    return 1 if found else 0


def _examine(run_dir: Path) -> int:
    run = RunDirectory(run_dir)
    if not run.logs_dir.is_dir():
        raise UserError(f"RUN_DIR: given '{run_dir}', allowed: the folder of a run, which has logs/")
    print("\n".join(diagnosis(run)))
    return 0


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
