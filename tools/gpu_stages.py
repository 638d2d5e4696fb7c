"""The stages of the GPU qualification: `python tools/gpu_stages.py STAGE [--quick]` prints its figures as JSON.

What they measure is in `tools/gpu/`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from tools.gpu.engine import rollout_and_difference, weight_sync
from tools.gpu.log_prob_head import log_prob_head
from tools.gpu.measure import Figures
from tools.gpu.training import curve, train_bf16, train_fp8

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(STAGES[arguments.stage](arguments.quick)))


def tests(quick: bool) -> Figures:
    """pytest over tests/gpu; fails if one of them does."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        ended = subprocess.run([sys.executable, "-m", "pytest", "tests/gpu", f"--junitxml={report}"], cwd=ROOT)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
        skipped = [
            f"{case.get('name')}: {skip.get('message')}"
            for case in ElementTree.parse(report).getroot().iter("testcase")
            for skip in case.iter("skipped")
        ]
    if ended.returncode:
        sys.exit(ended.returncode)
    return {"tests": int(suite["tests"]), "skipped": skipped}


def batch_invariance(quick: bool) -> Figures:
    """The same with and without batch-invariant kernels, each in a process of its own: they replace torch's."""
    found: Figures = {}
    for name in ("plain", "invariant"):
        command = [sys.executable, __file__, f"rollout_{name}", *(["--quick"] * quick)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(ended.stderr[-4000:])
        figures = json.loads(ended.stdout.strip().splitlines()[-1])
        found |= {f"{name}_{key}": value for key, value in figures.items()}
    return found


STAGES: dict[str, Callable[[bool], Figures]] = {
    "tests": tests,
    "log_prob_head": log_prob_head,
    "train_bf16": train_bf16,
    "train_fp8": train_fp8,
    "weight_sync": weight_sync,
    "curve": curve,
    "batch_invariance": batch_invariance,
    "rollout_plain": lambda quick: rollout_and_difference(False, quick),
    "rollout_invariant": lambda quick: rollout_and_difference(True, quick),
}


if __name__ == "__main__":
    main()
