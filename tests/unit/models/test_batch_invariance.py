"""Batch-invariant kernels of two libraries in one process: torch takes one replacement of an operator each."""

import importlib.util
import subprocess
import sys

import pytest

SCRIPT = """
import inspect
import torch
import megatron_rl.device
from megatron_rl.models import batch_invariance
from megatron.core.transformer.custom_layers import batch_invariant_kernels as kernels

# Without Transformer Engine core cannot patch it; only torch's operators are looked at here.
kernels._te_patch_for_batch_invariant = kernels._te_unpatch_for_batch_invariant = lambda: None

# Core's choice: of a CUDA build also where no GPU is.
key = getattr(torch.accelerator.current_accelerator(), "type", "cpu").upper()

def vllm_starts():
    # The operators that vLLM replaces on Hopper and newer, here with what torch would do anyway.
    library = torch.library.Library("aten", "IMPL")
    for name in ("_log_softmax", "softmax", "_softmax", "mean.dim"):
        library.impl(f"aten::{name}", lambda *arguments: None, key)
    return library

batch_invariance.make_room_for_vllm((9, 0))  # nothing was enabled: nothing happens
assert not kernels.is_batch_invariant_mode_enabled()
batch_invariance.enable()
refused = False
try:
    vllm_starts()
except RuntimeError as error:
    assert "already a kernel registered" in str(error), error
    refused = True
# torch 2.11 refuses, 2.13 lets the last one win.
assert refused != inspect.signature(torch.library.Library.impl).parameters["allow_override"].default
batch_invariance.make_room_for_vllm((9, 0) if key == "CUDA" else None)
assert kernels.is_batch_invariant_mode_enabled()
kept = vllm_starts()
assert {f"aten/mm/{key}", f"aten/addmm/{key}"} <= torch.library._impls
kernels.disable_batch_invariant_mode()
assert not {f"aten/mm/{key}", f"aten/addmm/{key}"} & torch.library._impls
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_vllms_kernels_find_room_beside_megatrons() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
