"""Runs the stages of the GPU qualification, each in a process of its own, and prints what they found as one table.

A stage is a function of `gpu_stages.py`. A process of its own, because a stage may run out of memory, hang or end with
its libraries in a state that the next one should not meet. What a stage lacks is found before it starts.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_rl.models.capabilities import has_transformer_engine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Stage:
    """What is measured, and what it needs besides a GPU."""

    name: str
    modules: tuple[str, ...]
    """Each has to be there, of 'a or b' one."""
    limit_s: float
    measures: str


STAGES = (
    Stage("tests", ("pytest", "megatron.core", "transformers"), 1800, "tests/gpu: kernels, layers, FP8, engine, curve"),
    Stage(
        "curve", ("megatron.core", "transformers"), 900, "20 steps in float32 and bfloat16 against float32 on the host"
    ),
    Stage("log_prob_head", (), 600, "fused log-prob heads against their matrix products: time, memory and aims"),
    Stage("train_bf16", ("megatron.core",), 900, "a training step in bfloat16: MFU, against its products, memory"),
    Stage("train_fp8", ("megatron.core", "transformer_engine"), 900, "the same with FP8 layers"),
    Stage("weight_sync", ("megatron.core", "vllm"), 900, "policy to engine, GB/s against a copy on the device"),
    Stage(
        "batch_invariance",
        ("megatron.core", "transformer_engine", "vllm", "flash_attn_interface or flash_attn.cute"),
        1800,
        "cost of batch-invariant kernels, and what difference of log-probs remains",
    ),
)


@dataclass
class Outcome:
    """How a stage ended."""

    stage: str
    state: str
    """'ran', 'failed' or 'not run'."""
    reason: str = ""
    """Why it did not run, or the end of what a failed one said."""
    found: dict[str, Any] = field(default_factory=dict)
    """Figures by name, with the unit in it."""


def gpu_name() -> str | None:
    """Name of the first GPU that torch sees; None: there is none."""
    if not _has("torch"):
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def missing(stage: Stage, gpu: str | None) -> str:
    """What keeps a stage from running; empty if nothing does."""
    absent = [modules for modules in stage.modules if not any(map(_has, modules.split(" or ")))]
    return ", ".join(["no GPU"] * (gpu is None) + [f"{module} is not installed" for module in absent])


def _has(module: str) -> bool:
    if module == "transformer_engine":
        return has_transformer_engine()
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def run_stage(stage: Stage, *, quick: bool) -> Outcome:
    """Run a stage in a process; it prints one line of JSON last."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_stages.py")), stage.name, *(["--quick"] * quick)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=stage.limit_s)
    except subprocess.TimeoutExpired:
        return Outcome(stage.name, "failed", f"no end after {stage.limit_s:g} s")
    lines = ended.stdout.strip().splitlines()
    if ended.returncode:
        return Outcome(stage.name, "failed", "\n".join((ended.stdout + ended.stderr).strip().splitlines()[-15:]))
    # Libraries may have a last word when the interpreter ends.
    found = next((line for line in reversed(lines) if line.startswith("{")), None)
    if found is None:
        return Outcome(stage.name, "failed", "it printed no figures")
    return Outcome(stage.name, "ran", found=json.loads(found))


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per figure."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.stage:18} {outcome.state}" + (f": {outcome.reason}" if outcome.reason else ""))
        lines += [f"  {name:44} {_shown(value)}" for name, value in outcome.found.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    from megatron_rl.models.capabilities import LIBRARIES, installed_version

    found = {library.name: installed_version(library) for library in LIBRARIES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def commit() -> str:
    """Of this repository, '+' behind it if files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        ended = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return ended.stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 1 if one failed. On a machine without a GPU none runs, and nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES), help="some of them, by comma")
    parser.add_argument("--quick", action="store_true", help="smaller shapes, fewer repetitions")
    arguments = parser.parse_args(argv)
    chosen = arguments.stages.split(",")
    if unknown := sorted(set(chosen) - {stage.name for stage in STAGES}):
        parser.error(f"--stages: given '{unknown[0]}', allowed: {', '.join(stage.name for stage in STAGES)}")
    gpu = gpu_name()
    outcomes = []
    for stage in (stage for stage in STAGES if stage.name in chosen):
        print(f"{stage.name}: {stage.measures} ...", file=sys.stderr, flush=True)
        lacks = missing(stage, gpu)
        outcomes.append(Outcome(stage.name, "not run", lacks) if lacks else run_stage(stage, quick=arguments.quick))
    print(f"{gpu or 'no GPU'}, {', '.join(f'{name} {version}' for name, version in versions().items())}\n")
    print(table(outcomes))
    if gpu is not None:
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        record = {
            "gpu": gpu,
            "date": today,
            "commit": commit(),
            "versions": versions(),
            "quick": arguments.quick,
            "stages": [asdict(outcome) for outcome in outcomes],
        }
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{re.sub('[^A-Za-z0-9]+', '-', gpu).lower()}-{today}.json"
        file.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\nwritten to {os.path.relpath(file)}")
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
