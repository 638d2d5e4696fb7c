"""Quantised weights: the formats, their arithmetic, and how a Hugging Face checkpoint stores them. Torch alone.

    format   weight                                     activation             scales
    fp8      float8_e4m3fn                              float8, dynamic        one per output channel / per token
    fp8_block  float8_e4m3fn                            float8, dynamic        one per 128 x 128 / per 128 of a token
    int8     int8, symmetric, [-127, 127]               int8, dynamic          one per output channel / per token
    int4     int4, symmetric, [-7, 7]                   as they are            one per 128 inputs of a channel
    nvfp4    float4 e2m1                                as they are            float8 per 16 inputs, float32 per layer

What is quantised are the linear layers of the decoder's attention and MLP; embedding, output layer, norms and routers
stay as they are. The numbers are ModelOpt's: a fake-quantised policy computes with exactly the values that are stored
here, so an engine that is sent these tensors has the same weights as the policy that was trained. Quantising a weight
that is on the grid of fp8, int8 or int4 gives the same codes and scales again. A weight is rounded once, from the
trained weight, and never from a rounded one of another format or grouping.

The checkpoint's layout is that of the compressed-tensors library, which vLLM and transformers load; fp8_block's is that
of DeepSeek-V3's release, and its rounding vLLM's own, which an engine would do to the same weights, bit for bit.
Source of the formats: github.com/vllm-project/compressed-tensors; OCP 8-bit floating point (E4M3), NVFP4 by NVIDIA.

`fold_awq_scales` folds AWQ's scales into the layers before, so that a checkpoint needs no extra operation for them. A
scaled layer computes (W diag(s)) (x / s), which is W x. The division costs nothing if x is the output of something
linear in its own parameters: a norm's weight, or the rows of the up projection, which the gated activation multiplies.
The input of attention's output projection mixes the values of several heads that share a group, so its scales cannot be
folded; it stays unscaled.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.config.schema import QuantizedFormat
from megatron_rl.models.tensor_map import TensorMap

QUANTIZED_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron's names of the layers that are quantised."""

_QUANTIZED = re.compile(rf"^decoder\.layers\.\d+\.(self_attention|mlp)\.({'|'.join(QUANTIZED_LAYERS)})\.weight$")
_OTHER_LINEAR = re.compile(r"^decoder\.layers\.\d+\..*(linear|proj|expert|router|conv).*\.weight\d*$")

_E4M3_MAX = 448.0
_INT8_MAX, _INT4_MAX = 127.0, 7.0
INT4_GROUP, NVFP4_GROUP = 128, 16
"""Consecutive inputs that share a scale."""
FP8_BLOCK = 128
"""Rows and columns of a block that shares a scale."""
_FP8_BLOCK_FLOOR = 1e-4
"""What vLLM takes for the largest magnitude of a block that has none larger."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float, by code; the code's highest bit is the sign."""

_GROUP_OF = {
    QuantizedFormat.int4: INT4_GROUP,
    QuantizedFormat.nvfp4: NVFP4_GROUP,
    QuantizedFormat.fp8_block: FP8_BLOCK,
}


def is_quantized(tensor_map: TensorMap) -> bool:
    """Whether a parameter's layer is one of those that are quantised."""
    return _QUANTIZED.match(tensor_map.name) is not None


def refusal(format: QuantizedFormat, maps: Sequence[TensorMap]) -> str | None:
    """Why a model cannot be stored in the format; None if it can."""
    group = _GROUP_OF.get(format, 1)
    for tensor_map in maps:
        if not is_quantized(tensor_map):
            if _OTHER_LINEAR.match(tensor_map.name):
                return f"only dense attention and MLP layers can be quantised, and the model has {tensor_map.name}"
            continue
        for name, shape in tensor_map.hf_shapes.items():
            if shape[1] % group:
                return f"{format.value} groups {group} inputs, and {name} has {shape[1]}"
            if format is QuantizedFormat.fp8_block and shape[0] % group:  # vLLM fuses layers at block boundaries alone
                return f"{format.value} groups {group} outputs, and {name} has {shape[0]}"
    return None


def quantize_group(format: QuantizedFormat, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of Hugging Face weights that one Megatron parameter is made of.

    Args:
        format: of the result.
        weights: `*.weight` [N, K] each, any floating dtype; they share nvfp4's scale of a layer, as vLLM, which fuses
            them, wants it.

    Returns:
        Name -> tensor. fp8, int8: `weight` [N, K] and `weight_scale` [N, 1] float32. fp8_block: `weight` and
        `weight_scale_inv` [N/128, K/128] float32, rounded up. int4: `weight_packed` int32 [N, K/8], `weight_scale`
        [N, K/128] in the weight's dtype, `weight_shape`. nvfp4: `weight_packed` uint8 [N, K/2], `weight_scale` float8
        [N, K/16], `weight_global_scale` float32 [1].
    """
    largest = torch.stack([weight.detach().abs().amax().float() for weight in weights.values()]).amax()
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stem = name.removesuffix("weight")
        tensors = _quantize(format, weight.detach(), largest)
        stored |= {f"{stem}{suffix}": tensor for suffix, tensor in tensors.items()}
    return stored


def _quantize(format: QuantizedFormat, weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    if format is QuantizedFormat.nvfp4:
        return _nvfp4(weight, largest)
    if format is QuantizedFormat.int4:
        return _int4(weight)
    if format is QuantizedFormat.fp8_block:
        return _fp8_block(weight)
    top = _E4M3_MAX if format is QuantizedFormat.fp8 else _INT8_MAX
    amax = weight.float().abs().amax(dim=1, keepdim=True)
    # Multiplied by the reciprocal and not divided by the scale, as ModelOpt does: the last bit decides ties.
    scaled = weight.float() * (top / amax.clamp(min=torch.finfo(torch.float32).tiny))
    if format is QuantizedFormat.fp8:
        codes = scaled.clamp(-top, top).to(torch.float8_e4m3fn)
    else:
        codes = scaled.round().clamp(-top, top).to(torch.int8)
    return {"weight": codes, "weight_scale": amax / top}


def _fp8_block(weight: Tensor) -> dict[str, Tensor]:
    """scale = max(largest magnitude of the block, 1e-4) / 448, codes = weight * (1 / scale), in float32."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=_FP8_BLOCK_FLOOR) / _E4M3_MAX
    codes = (blocks * (1.0 / scale)).to(torch.float8_e4m3fn).view(padded.shape)
    return {"weight": codes[:rows, :columns].contiguous(), "weight_scale_inv": scale[:, 0, :, 0].contiguous()}


def _int4(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.float().unflatten(1, (-1, INT4_GROUP))
    scale = (groups.abs().amax(dim=2, keepdim=True) / _INT4_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    # The scale is stored in the weight's dtype: round with the one that will be read.
    scale = scale.to(weight.dtype)
    codes = (groups / scale.float()).round().clamp(-_INT4_MAX, _INT4_MAX).flatten(1).to(torch.int64)
    # Eight codes of 4 bits in one int32, the first in the lowest bits, each with 8 added to be unsigned.
    nibbles = (codes + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4, device=weight.device)
    packed = nibbles.sum(dim=2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return {"weight_packed": packed, "weight_scale": scale.squeeze(2), "weight_shape": torch.tensor(weight.shape)}


def _nvfp4(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    groups = weight.float().unflatten(1, (-1, NVFP4_GROUP))
    global_scale = _E4M3_MAX * _E2M1[-1] / largest.clamp(min=torch.finfo(torch.float32).tiny)
    scale = groups.abs().amax(dim=2, keepdim=True) / _E2M1[-1] * global_scale
    scale = scale.clamp(2.0**-9, _E4M3_MAX).to(torch.float8_e4m3fn)
    magnitudes = torch.tensor(_E2M1, device=weight.device)
    scaled = (groups * (global_scale / scale.float())).clamp(-_E2M1[-1], _E2M1[-1]).flatten(1)
    # Nearest magnitude; half-way between two, the one with the even code.
    upper = torch.bucketize(scaled.abs(), magnitudes).clamp(max=7)
    lower = (upper - 1).clamp(min=0)
    middle = (magnitudes[upper] + magnitudes[lower]) / 2
    takes_upper = (scaled.abs() > middle) | ((scaled.abs() == middle) & (upper % 2 == 0))
    codes = torch.where(takes_upper, upper, lower) | ((scaled < 0).long() << 3)
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    return {"weight_packed": packed, "weight_scale": scale.squeeze(2), "weight_global_scale": global_scale.reshape(1)}


def dequantize(format: QuantizedFormat, stored: dict[str, Tensor]) -> Tensor:
    """The weight [N, K], float32, that a layer's stored tensors (named without the layer) stand for."""
    if format in (QuantizedFormat.fp8, QuantizedFormat.int8):
        return stored["weight"].float() * stored["weight_scale"]
    if format is QuantizedFormat.fp8_block:
        codes = stored["weight"].float()
        scales = stored["weight_scale_inv"].repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        return codes * scales[: codes.shape[0], : codes.shape[1]]
    packed, scale = stored["weight_packed"].long(), stored["weight_scale"].float()
    if format is QuantizedFormat.int4:
        codes = (packed[..., None] >> torch.arange(0, 32, 4, device=packed.device)) & 15
        values = (codes.flatten(1) - 8).float()
    else:
        codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
        values = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), device=packed.device)[codes]
        scale = scale / stored["weight_global_scale"]
    return torch.mul(values.unflatten(1, (scale.shape[1], -1)), scale[..., None]).flatten(1)


def quantized_tensors(
    format: QuantizedFormat, tensors: Iterable[tuple[str, Tensor]], maps: Sequence[TensorMap]
) -> Iterator[tuple[str, Tensor]]:
    """A stream of Hugging Face tensors with the quantised layers' replaced by their stored tensors.

    Args:
        format: of the result.
        tensors: (name, full tensor), those of one map one after another, as `HFTensorIterator` yields them.
        maps: the family's table.
    """
    group_of = {name: tuple(m.hf_shapes) for m in maps if is_quantized(m) for name in m.hf_shapes}
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in group_of:
            yield name, tensor
            continue
        held[name] = tensor
        if len(held) == len(group_of[name]):
            assert held.keys() == set(group_of[name]), "the tensors of a map come one after another"
            yield from quantize_group(format, held).items()
            held = {}
    assert not held, f"{next(iter(held))} came without the rest of its layer"


def quantization_config(format: QuantizedFormat) -> dict[str, Any]:
    """The entry `quantization_config` of config.json: what vLLM and transformers read."""
    if format is QuantizedFormat.fp8_block:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    per_token = {"dynamic": True, "strategy": "token", "symmetric": True}
    eight_bits = {"num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}
    kinds: dict[QuantizedFormat, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
        QuantizedFormat.fp8: (
            "float-quantized",
            {"type": "float", **eight_bits},
            {"num_bits": 8, "type": "float", **per_token},
        ),
        QuantizedFormat.int8: (
            "int-quantized",
            {"type": "int", **eight_bits},
            {"num_bits": 8, "type": "int", **per_token},
        ),
        QuantizedFormat.int4: (
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": INT4_GROUP, "symmetric": True},
            None,
        ),
        QuantizedFormat.nvfp4: (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_GROUP, "symmetric": True},
            None,
        ),
    }
    layout, weights, activations = kinds[format]
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }


_LAYER = re.compile(r"^(decoder\.layers\.\d+)\.(?:self_attention|mlp)\.(linear_\w+)$")


@torch.no_grad()
def fold_awq_scales(parameters: dict[str, Tensor], scales: dict[str, Tensor], *, norms: bool, gated: bool) -> None:
    """Scale the columns of the weights in `parameters` and undo it in the layer before; the model stays the same.

    Args:
        parameters: whole (unsharded) Megatron parameters by table name; changed in place.
        scales: module name -> [K], what multiplies the columns of its weight.
        norms: the norms have no bias and their weight is the whole factor, as RMSNorm's.
        gated: the MLP multiplies the up projection, the second half of linear_fc1's rows, into the activation.
    """
    for name, scale in scales.items():
        match = _LAYER.match(name)
        if match is None:
            continue
        layer, kind = match.groups()
        if kind == "linear_fc2":
            fc1 = f"{layer}.mlp.linear_fc1"
            if not gated or f"{fc1}.bias" in parameters:
                continue
            before = parameters[f"{fc1}.weight"].chunk(2)[1]
            before.div_(scale.to(before.dtype)[:, None])
        elif kind in ("linear_qkv", "linear_fc1") and norms:
            norm = "input_layernorm" if kind == "linear_qkv" else "pre_mlp_layernorm"
            before = parameters[f"{layer}.{norm}.weight"]
            before.div_(scale.to(before.dtype))
        else:
            continue
        weight = parameters[f"{name}.weight"]
        weight.mul_(scale.to(weight.dtype))
