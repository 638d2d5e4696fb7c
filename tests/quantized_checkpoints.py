"""Checkpoints as they are released quantised, and beside each its weights unpacked, by other arithmetic than ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.checkpoints import make_checkpoint


def make_mxfp4(root: Path) -> tuple[Path, Path]:
    """GPT-OSS with its experts in MXFP4, and unpacked."""
    plain = make_checkpoint(root / "plain", "gpt_oss", seed=2)
    tensors, packed = load_file(plain / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator).to(torch.uint8)
        # Codes are of the order of 2; times 2^-5 and 2^-6, the layer's outputs are of the order of 1.
        scales = torch.randint(121, 123, (experts, rows, columns // 32), generator=generator).to(torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).float().contiguous()
    return plain, _pair(root, plain, tensors, packed, {"quant_method": "mxfp4"})


def make_fp8(root: Path) -> tuple[Path, Path]:
    """DeepSeek-V3 with its matrices in float8, a scale for each 128 x 128 block, and a layer that predicts a further
    token; and unpacked, without that layer."""
    plain = make_checkpoint(root / "plain", "deepseek_v3", seed=2)
    tensors, packed = load_file(plain / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        packed[name], packed[f"{name}_scale_inv"], tensors[name] = _in_blocks(tensors[name])
    further = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    further["model.layers.2.eh_proj.weight"] = torch.zeros(128, 256)
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    folder = _pair(root, plain, tensors, packed | further, method, num_nextn_predict_layers=1)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}, indent=2) + "\n")
    return plain, folder


def _in_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and codes x scales, in whole blocks cut to size."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight
    blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # [R, 128, C, 128]
    scales = blocks.abs().amax((1, 3)) / 448.0  # the largest number of E4M3
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    unpacked = codes.float() * scales[:, None, :, None]
    whole = [x.flatten(2).flatten(0, 1)[:rows, :columns].contiguous() for x in (codes, unpacked)]
    return whole[0], scales, whole[1]


def _pair(
    root: Path,
    plain: Path,
    tensors: dict[str, Tensor],
    packed: dict[str, Tensor],
    method: dict[str, Any],
    **fields: Any,
) -> Path:
    """Rewrite the plain checkpoint with `tensors`; write beside it one with the packed ones in their places."""
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    folder = Path(shutil.copytree(plain, root / "quantized"))
    replaced = {name.removesuffix("_blocks") for name in packed}
    kept = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    save_file({**kept, **packed}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, **fields, "quantization_config": method}, indent=2) + "\n"
    )
    return folder
