"""Parameters in FP8. Transformer Engine needs a GPU, so a tensor class stands in that has its three properties.

Its views are copies in higher precision, `copy_` quantises, and `dequantize` gives the values of the codes. The class
itself is Transformer Engine's on a GPU: tests/gpu/test_fp8.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.models.tensor_map import gate_up
from megatron_rl.weights.files.hf_reader import HFCheckpointReader
from megatron_rl.weights.quantized.fp8_parameters import dequantized, fillable


class CodesAndScale(torch.Tensor):
    """A parameter of E4M3 codes and one scale; as a tensor it looks like bfloat16."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def of(value: Tensor) -> "CodesAndScale":
        made = torch.Tensor._make_subclass(CodesAndScale, torch.zeros(value.shape, dtype=torch.bfloat16))
        return made.copy_(value)

    def copy_(self, value: Tensor, non_blocking: bool = False) -> "CodesAndScale":  # type: ignore[override]
        self.scale = value.float().abs().amax() / 448
        self.codes = (value.float() / self.scale).to(torch.float8_e4m3fn)
        return self

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale

    def detach(self) -> "CodesAndScale":
        return self

    def narrow(self, dim: int, start: int, length: int) -> Tensor:  # type: ignore[override]
        return self.dequantize().narrow(dim, start, length)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr(fp8_utils, "FP8_TENSOR_CLASS", CodesAndScale)
    monkeypatch.setattr(fp8_utils, "is_te_min_version", lambda version: True)


def test_a_checkpoint_is_rounded_once_and_the_optimizers_copy_not_at_all(tmp_path: Path) -> None:
    gate, up = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    save_file({"gate": gate.contiguous(), "up": up.contiguous()}, tmp_path / "model.safetensors")
    tensor_map = gate_up("mlp.linear_fc1.weight", "gate", "up", (4, 8))
    whole = torch.cat([gate, up])

    parameter: Any = CodesAndScale.of(torch.ones(8, 8))
    parameter.get_high_precision_init_val = lambda: parameter._high_precision_init_val
    HFCheckpointReader(tmp_path).read_shard(tensor_map, 0, 1, parameter)

    scale = whole.abs().amax() / 448
    assert torch.equal(dequantized(parameter, torch.float32), (whole / scale).to(torch.float8_e4m3fn).float() * scale)
    assert torch.equal(parameter.get_high_precision_init_val(), whole)


def test_without_it_a_view_would_swallow_what_is_written() -> None:
    """What `fillable` is for: the stand-in, like the real class, forgets what is written to a view of it."""
    parameter = CodesAndScale.of(torch.ones(4, 4))
    parameter.narrow(0, 0, 4).copy_(torch.full((4, 4), 2.0))
    assert torch.equal(dequantized(parameter, torch.float32), torch.ones(4, 4))
    with fillable(parameter) as filled:
        filled.narrow(0, 0, 4).copy_(torch.full((4, 4), 2.0))
    assert torch.equal(dequantized(parameter, torch.float32), torch.full((4, 4), 2.0))


def test_values_of_codes_are_rounded_to_the_dtype_that_travels() -> None:
    parameter = CodesAndScale.of(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    sent = dequantized(parameter, torch.bfloat16)
    assert sent.dtype is torch.bfloat16
    assert torch.equal(sent, parameter.dequantize().bfloat16())


def test_other_parameters_are_themselves() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    with fillable(parameter) as filled:
        assert filled is parameter
    assert dequantized(parameter, torch.bfloat16).data_ptr() == parameter.data_ptr()
