"""Checkpoints as they are released quantised: over ranks and in one process they give what their weights stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_rl.checkpoint.convert import hf_to_megatron, megatron_to_hf
from tests.distributed.spawn import run_ranks
from tests.distributed.test_conversion import TOLERANCE, Case, hf_log_probs, visit
from tests.quantized_checkpoints import make_fp8, make_mxfp4

SEQUENCES = [[5, 17, 201, 33, 8, 9, 41], [250, 3, 77, 77, 12, 64, 31, 5, 5, 90]]


def assert_same_weights(folder: Path, plain: Path) -> None:
    """The same bytes of every tensor, and no word of a quantisation in config.json."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, plain))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert np.array_equal(ours[name].numpy(), tensor.numpy()), name
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, plain)]
    assert configs[0] == configs[1]


def test_mxfp4_in_one_process(tmp_path: Path) -> None:
    plain, quantized = make_mxfp4(tmp_path)
    difference = hf_to_megatron(hf_path=quantized, output=tmp_path / "megatron", verify=True)
    assert difference is not None
    assert difference < TOLERANCE  # transformers unpacks it too
    megatron_to_hf(checkpoint=tmp_path / "megatron", hf_path=quantized, output=tmp_path / "back", verify=True)
    assert_same_weights(tmp_path / "back", plain)


def test_fp8_in_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain, quantized = make_fp8(tmp_path)
    hf_to_megatron(hf_path=quantized, output=tmp_path / "megatron")
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megatron-rl:")]
    assert len(told) == 1
    assert "layers 2 to 2, which predict further tokens, are not read" in told[0]
    megatron_to_hf(checkpoint=tmp_path / "megatron", hf_path=quantized, output=tmp_path / "back", verify=True)
    assert_same_weights(tmp_path / "back", plain)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "layout"), [(make_mxfp4, "ep2"), (make_fp8, "tp2_ep2"), (make_fp8, "tp2_sp")])
def test_over_ranks(tmp_path: Path, make: Callable[[Path], tuple[Path, Path]], layout: str) -> None:
    plain, quantized = make(tmp_path)
    case = Case({"quantized": quantized}, SEQUENCES, {"quantized": hf_log_probs(plain, SEQUENCES)})
    for of_rank in run_ranks(visit, 2, layout, case, tmp_path / "out", timeout_s=300.0):
        for ours, theirs in zip(of_rank["quantized"], case.log_probs["quantized"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    assert_same_weights(tmp_path / "out" / "quantized", plain)
