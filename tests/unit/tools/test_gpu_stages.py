"""The stages of the GPU qualification at small shapes on a CPU: they run to their end and their figures are sane.

What they say of speed means nothing here. Each runs in a process of its own, as the qualification starts it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]
SMALL = "dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32)"


def figures(call: str) -> dict[str, Any]:
    """Of `call`, with the 1B shape replaced by a small one."""
    script = (
        f"import json; from tools import gpu_stages as stages; from tools.gpu import measure, training; "
        f"measure.SHAPES['1B'] = {SMALL} | dict(vocab_size=600, num_key_value_heads=1); print(json.dumps({call}))"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(next(line for line in reversed(ended.stdout.splitlines()) if line[0] == "{"))
    return found


def test_log_prob_head() -> None:
    found = figures("stages.log_prob_head(False, tokens=64, hidden=32, vocab=500)")
    # float32 against float64, of log-probs of about 7 nats.
    assert found["log_probs_error_against_float64"] < 1e-5
    assert found["gradient_error_against_float64"] < 1e-5
    for head in ("two_pass", "single_pass"):
        assert found[f"{head}_part_of_product_rate"] == pytest.approx(found["floor_ms"] / found[f"{head}_ms"])
        assert found[f"{head}_aims"].startswith("rate ")


@pytest.mark.slow
def test_training_step() -> None:
    found = figures("training.training_step(True, length=16)")
    # Two layers: q, k, v 64 x 128, output 64 x 64, gate, up and down 64 x 128; two norms of 64 and two of 32. Output
    # layer 64 x 600 and the last norm.
    weights = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 32) + 64 * 600 + 64
    assert found["shape"] == f"1B, {weights / 1e9:.2f}G weights in products, 64 tokens"
    flop = 64 * (6 * weights + 6 * 2 * 2 * 32 * 16)
    assert found["model_TFLOP_per_s"] * found["step_s"] * 1e12 == pytest.approx(flop)
    assert found["step_over_floor"] > 1.0, "a step is more than its products"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has it")
def test_weight_sync_and_curve() -> None:
    found = figures("stages.weight_sync(True)")
    assert found["sync_over_copy"] > 0.0
    found = figures("stages.curve(True)")
    assert found["float32_portable_largest_relative_difference"] < 1e-5, "here both are the host"
    assert found["bf16_largest_relative_difference"] < 0.05
