"""Weights that a checkpoint stores quantised: every code and scale, by hand and against transformers' own unpacking."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_rl.config.errors import UserError
from megatron_rl.models.tensor_map import TensorMap, alternating_gate_up, of_expert, split, stacked
from megatron_rl.weights.files.hf_reader import HFCheckpointReader

NUM_EXPERTS, HIDDEN, FFN = 3, 64, 96


def fc1(expert: int) -> TensorMap:
    return of_expert(alternating_gate_up(f"e{expert}.fc1", "up", (2 * FFN, HIDDEN)), expert, NUM_EXPERTS)


def fc2(expert: int) -> TensorMap:
    return of_expert(split(f"e{expert}.fc2", "down", (HIDDEN, FFN), dim=1), expert, NUM_EXPERTS)


MAPS = [
    *stacked([fc1(expert) for expert in range(NUM_EXPERTS)], transposed=True),
    *stacked([fc2(expert) for expert in range(NUM_EXPERTS)], transposed=True),
]


def packed(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (NUM_EXPERTS, rows, columns // 32, 16), generator=generator)
    scales = torch.randint(117, 132, (NUM_EXPERTS, rows, columns // 32), generator=generator)
    return {"blocks": blocks.to(torch.uint8), "scales": scales.to(torch.uint8)}


def reader(folder: Path, **tensors: Tensor) -> HFCheckpointReader:
    save_file(tensors, folder / "model.safetensors")
    return HFCheckpointReader(folder)


@pytest.fixture
def experts(tmp_path: Path) -> HFCheckpointReader:
    tensors = {f"{name}_{part}": value for name, value in of_layer().items() for part, value in value.items()}
    return reader(tmp_path, **tensors)


def of_layer() -> dict[str, dict[str, Tensor]]:
    return {"up": packed(2 * FFN, HIDDEN, 1), "down": packed(HIDDEN, FFN, 2)}


def test_codes_and_scales_by_hand(tmp_path: Path) -> None:
    """One row of 64 elements: all sixteen codes in the first bytes, low half first, then codes of 0."""
    codes = torch.tensor([low + 16 * (low + 1) for low in range(0, 16, 2)], dtype=torch.uint8)  # 0x10, 0x32, ...
    blocks = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :8] = codes
    blocks[0, 0, 1, 0] = 0x72  # code 2 is 1, code 7 is 6
    scales = torch.tensor([[[128, 0]]], dtype=torch.uint8)  # 2^1 and 2^-127
    (tensor_map,) = stacked([of_expert(split("ours", "w", (1, 64), dim=0), 0, 1)], transposed=True)
    held = reader(tmp_path, w_blocks=blocks, w_scales=scales)
    held.check([tensor_map])
    shard = torch.empty(1, 64)
    held.read_shard(tensor_map, 0, 1, shard)
    positive = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    assert shard[0, :16].tolist() == positive + [-x for x in positive]
    assert shard[0, 16:32].tolist() == [0.0] * 16
    assert shard[0, 32:34].tolist() == [2.0**-127, 6 * 2.0**-127]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 2])
def test_shards_are_those_of_what_transformers_unpacks(
    experts: HFCheckpointReader, dtype: torch.dtype, size: int
) -> None:
    experts.check(MAPS)
    for name, parts in of_layer().items():
        whole = convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=torch.bfloat16)
        for tensor_map in (m for m in MAPS if name in m.hf_shapes):
            matrix = whole[tensor_map.index].t()  # [rows of the parameter, columns]
            if name == "up":
                halves = [matrix[0::2].chunk(size), matrix[1::2].chunk(size)]
                expected = [torch.cat([gate, up]) for gate, up in zip(*halves, strict=True)]
            else:
                expected = list(matrix.chunk(size, dim=1))
            for rank, values in enumerate(expected):
                shard = torch.full(values.shape, torch.nan, dtype=dtype)
                experts.read_shard(tensor_map, rank, size, shard)
                assert torch.equal(shard, values.to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_scales": None}, r"model\.safetensors: tensor 'up_scales' is missing beside 'up_blocks'"),
        (
            {"up_scales": torch.zeros(3, 192, 3, dtype=torch.uint8)},
            r"'up_scales' has shape \(3, 192, 3\) .* \(3, 192, 2\)",
        ),
        ({"up_blocks": torch.zeros(3, 192, 2, 8, dtype=torch.uint8)}, r"'up_blocks' has shape .* \(3, 192, 2, 16\)"),
        ({"up_blocks": torch.zeros(3, 192, 2, 16)}, r"'up_blocks' has shape .* and dtype F32, .* dtype U8"),
        ({"up_blocks": None}, "tensor 'up_scales' is unknown"),
    ],
)
def test_a_wrong_part_is_named(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    tensors = {f"{name}_{part}": value for name, value in of_layer().items() for part, value in value.items()}
    tensors = {name: value for name, value in (tensors | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        reader(tmp_path, **tensors).check(MAPS)
