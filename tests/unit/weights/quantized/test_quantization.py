"""Quantised weights: literal cases, the grids, one rounding, and the layouts that compressed-tensors reads."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from megatron_rl.config.schema import QuantizedFormat
from megatron_rl.models.tensor_map import gate_up, replicated, split
from megatron_rl.weights.quantized.formats import dequantize, quantize_group, quantized_tensors, refusal

FORMATS = tuple(QuantizedFormat)
ROUND_TRIP = {
    # Half the widest step of the grid, as a part of the largest magnitude that shares the scale.
    QuantizedFormat.fp8: 16 / 448,  # from 256 to 448 the values are 32 apart
    QuantizedFormat.fp8_block: 16 / 448,
    QuantizedFormat.int8: 0.5 / 127,
    QuantizedFormat.int4: 0.5 / 7,
    # From 4 to 6 the values are 2 apart; and the scale itself is rounded to 3 bits of mantissa, by at most 1/16.
    QuantizedFormat.nvfp4: 1 / 6 + 1 / 16,
}


def draw(rows: int = 24, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def stored(format: QuantizedFormat, weight: Tensor) -> dict[str, Tensor]:
    return {name.removeprefix("x."): t for name, t in quantize_group(format, {"x.weight": weight}).items()}


def test_int8_by_hand() -> None:
    # The largest magnitude of each row becomes 127: scales 2/127 and 1/127. 1.0 of the first row is 63.5 steps, a tie,
    # which goes to the even 64; 0.25 of the second 31.75, rounded to 32. A row of zeros stays one.
    weight = torch.tensor([[-2.0, 1.0], [1.0, 0.25], [0.0, 0.0]])
    tensors = stored(QuantizedFormat.int8, weight)
    assert tensors["weight"].tolist() == [[-127, 64], [127, 32], [0, 0]]
    assert tensors["weight_scale"].flatten().tolist() == pytest.approx([2 / 127, 1 / 127, 0.0])


def test_fp8_by_hand() -> None:
    # 448 is E4M3's largest value. Between 16 and 32 its values are 2 apart: 17 is a tie, even mantissa wins: 16.
    tensors = stored(QuantizedFormat.fp8, torch.tensor([[448.0, 17.0, 19.5, -3.0]]))
    assert tensors["weight"].float().tolist() == [[448.0, 16.0, 20.0, -3.0]]
    assert tensors["weight_scale"].tolist() == [[1.0]]


def test_fp8_blocks_by_hand() -> None:
    # Blocks of 128 x 128 have a scale each: 896 / 448 = 2, and vLLM's floor of 1e-4 where there are only zeros.
    weight = torch.zeros(129, 256)
    weight[0, 0], weight[127, 1], weight[128, 130] = 896.0, 35.0, -448.0
    tensors = stored(QuantizedFormat.fp8_block, weight)
    floor = torch.tensor(1e-4) / 448
    assert tensors["weight_scale_inv"].tolist() == [[2.0, float(floor)], [float(floor), 1.0]]
    codes = tensors["weight"].float()
    # 17.5 is nearer to 18 than to 16, and codes are 2 apart there.
    assert (codes[0, 0], codes[127, 1], codes[128, 130]) == (448.0, 18.0, -448.0)
    assert torch.count_nonzero(codes) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (384, 256), (200, 300)])
def test_fp8_blocks_are_rounded_as_vllm_rounds_them(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Bit for bit what an engine makes of the same weights with its own `fp8_per_block`, blocks cut at the edge too.

    vLLM's function as it is written; compiled, which takes half a minute here, it may round the reciprocal otherwise.
    """
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[: shape[0] // 2] *= 1e-6  # below the floor
    with torch.compiler.set_stance("force_eager"):
        codes, scales = per_block_cast_to_fp8(weight, [128, 128], use_ue8m0=False)
    tensors = stored(QuantizedFormat.fp8_block, weight)
    assert torch.equal(tensors["weight"].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(tensors["weight_scale_inv"], scales)


def test_nvfp4_by_hand() -> None:
    # The layer's largest magnitude, 6, gives the float32 scale 448 * 6 / 6; its group's own scale is 6 / 6 * 448 = 448.
    # Then every value is a code's magnitude; 2.5 is a tie between 2 (code 4) and 3 (code 5): the even code.
    group = torch.zeros(16)
    group[:8] = torch.tensor([6.0, -6.0, 0.5, -0.5, 2.5, 1.0, 3.0, 4.0])
    tensors = stored(QuantizedFormat.nvfp4, group[None])
    low_first = [7 | 15 << 4, 1 | 9 << 4, 4 | 2 << 4, 5 | 6 << 4]
    assert tensors["weight_packed"][0, :4].tolist() == low_first
    assert tensors["weight_scale"].float().tolist() == [[448.0]]
    assert tensors["weight_global_scale"].tolist() == [448.0]
    assert dequantize(QuantizedFormat.nvfp4, tensors)[0, :5].tolist() == [6.0, -6.0, 0.5, -0.5, 2.0]


def test_int4_is_packed_as_compressed_tensors_packs_it() -> None:
    weight = draw()
    tensors = stored(QuantizedFormat.int4, weight)
    codes = dequantize(QuantizedFormat.int4, tensors).unflatten(1, (-1, 128)) / tensors["weight_scale"][..., None]
    assert torch.equal(tensors["weight_packed"], pack_to_int32(codes.round().flatten(1).to(torch.int8), 4))
    assert tensors["weight_shape"].tolist() == list(weight.shape)


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_is_within_half_a_step(format: QuantizedFormat) -> None:
    weight = draw()
    error = (dequantize(format, stored(format, weight)) - weight).abs()
    groups = {QuantizedFormat.int4: 128, QuantizedFormat.nvfp4: 16, QuantizedFormat.fp8_block: 128}
    shares = groups.get(format, weight.shape[1])
    largest = weight.unflatten(1, (-1, shares)).abs().amax(2, keepdim=True)
    if format is QuantizedFormat.fp8_block:
        largest = largest.amax(0, keepdim=True)  # all rows of the draw are in one block
    relative = float((error.unflatten(1, (-1, shares)) / largest).max())
    # Not far below the bound either: a grid finer than the format's would be another format.
    assert 0.5 * ROUND_TRIP[format] < relative <= ROUND_TRIP[format] * (1 + 1e-5)


@pytest.mark.parametrize("format", [f for f in FORMATS if f is not QuantizedFormat.nvfp4])
def test_what_is_on_the_grid_stays_there(format: QuantizedFormat) -> None:
    """A second export or sync does not round again. nvfp4's would, by new scales of its groups."""
    once = stored(format, draw())
    again = stored(format, dequantize(format, once))
    for name, tensor in once.items():
        # The codes are equal; a float32 scale may differ in its last bit, by the order of the products.
        torch.testing.assert_close(again[name].float(), tensor.float(), rtol=2**-23, atol=0)


def test_through_bfloat16_it_would_be_rounded_twice() -> None:
    """Why a sync quantises from the parameters' own dtype."""
    weight = draw()
    codes = stored(QuantizedFormat.int8, weight)["weight"]
    assert (stored(QuantizedFormat.int8, weight.bfloat16())["weight"] != codes).any()


def test_the_layers_that_vllm_fuses_share_nvfp4s_scale() -> None:
    gate, up = draw(8), 4 * draw(8)
    tensors = quantize_group(QuantizedFormat.nvfp4, {"gate.weight": gate, "up.weight": up})
    assert torch.equal(tensors["gate.weight_global_scale"], tensors["up.weight_global_scale"])
    alone = quantize_group(QuantizedFormat.nvfp4, {"gate.weight": gate})
    assert not torch.equal(tensors["gate.weight_global_scale"], alone["gate.weight_global_scale"])


MAPS = [
    replicated("decoder.layers.0.input_layernorm.weight", "norm.weight", (128,)),
    gate_up("decoder.layers.0.mlp.linear_fc1.weight", "gate.weight", "up.weight", (8, 128)),
    split("decoder.layers.0.mlp.linear_fc2.weight", "down.weight", (128, 8), dim=1),
]


def test_a_stream_keeps_its_order_and_what_is_not_quantised() -> None:
    tensors = [("norm.weight", torch.ones(128)), ("gate.weight", draw(8, 128)), ("up.weight", draw(8, 128))]
    names = [name for name, _ in quantized_tensors(QuantizedFormat.fp8, tensors, MAPS)]
    assert names == ["norm.weight", "gate.weight", "gate.weight_scale", "up.weight", "up.weight_scale"]
    with pytest.raises(AssertionError, match=r"gate\.weight came without"):
        list(quantized_tensors(QuantizedFormat.fp8, tensors[:2], MAPS))


def test_refusals_name_the_tensor() -> None:
    assert refusal(QuantizedFormat.fp8, MAPS) is None
    assert refusal(QuantizedFormat.int4, MAPS) == "int4 groups 128 inputs, and down.weight has 8"
    experts = split("decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight", "w.weight", (8, 8), dim=1)
    assert "only dense attention" in (refusal(QuantizedFormat.int8, [experts]) or "")
