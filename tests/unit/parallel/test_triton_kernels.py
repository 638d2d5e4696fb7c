"""The Triton kernels of the log-prob head in Triton's interpreter: the tests of tests/gpu, without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2] / "gpu" / "test_log_prob_head.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_they_agree_with_float64_in_the_interpreter() -> None:
    # A process of its own: Triton reads the variable when it is imported.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(TESTS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    # What needs a device's memory is skipped, nothing else.
    assert " passed, 2 skipped" in run.stdout, run.stdout
