"""Shards of all ranks into one set of files: what the safetensors library reads there, and writes itself."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.models.tensor_map import (
    TensorMap,
    alternating_gate_up,
    gate_up,
    of_expert,
    qkv,
    replicated,
    split,
    stacked,
    vocabulary,
)
from megatron_rl.weights.files.hf_reader import HFCheckpointReader
from megatron_rl.weights.files.hf_writer import ExportPlan, ShardWriter

MAPS = [
    vocabulary("embedding", "embed", (5, 6)),
    replicated("norm", "ln", (6,)),
    qkv("qkv", "q", "k", "v", num_heads=4, num_groups=2, head_dim=4, columns=(6,)),
    split("proj", "o", (6, 16), dim=1),
    gate_up("fc1", "gate", "up", (8, 6)),
    *stacked([of_expert(alternating_gate_up(f"e{i}.fc1", "w1", (8, 6)), i, 3) for i in range(3)], transposed=True),
    *stacked([of_expert(split(f"e{i}.fc2", "w2", (6, 4), dim=1), i, 3) for i in range(3)], transposed=True),
    *stacked([of_expert(alternating_gate_up(f"e{i}.b1", "b1", (8,)), i, 3) for i in range(3)]),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for tensor_map in MAPS for name, shape in tensor_map.hf_shapes.items()}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype(name)) for name, shape in shapes.items()}
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dtype(name: str) -> torch.dtype:
    return torch.float32 if name in ("ln", "b1") else torch.bfloat16


def export(source: Path, folder: Path, size: int, **limits: int) -> None:
    """Every rank reads its shards of the source, in float32, and writes them; the last rank first."""
    reader, plan = HFCheckpointReader(source), ExportPlan(MAPS, dtype, **limits)
    folder.mkdir()
    plan.create(folder)
    for rank in reversed(range(size)):
        with ShardWriter(plan, folder) as writer:
            for tensor_map in MAPS:
                writer.write(tensor_map, rank, size, shard(reader, tensor_map, rank, size))


def shard(reader: HFCheckpointReader, tensor_map: TensorMap, rank: int, size: int) -> Tensor:
    into = torch.full(tensor_map.shard_shape(rank, size), torch.nan)
    reader.read_shard(tensor_map, rank, size, into)
    return into


@pytest.mark.parametrize("size", [1, 2, 4])  # with four ranks two share a group of key-value heads
def test_a_round_trip_gives_the_same_file(tmp_path: Path, source: Path, size: int) -> None:
    export(source, tmp_path / "new", size)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_several_files(tmp_path: Path, source: Path) -> None:
    export(source, tmp_path / "new", 2, max_file_bytes=300)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    expected = load_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert len(set(index["weight_map"].values())) > 2
    for name, tensor in expected.items():
        assert torch.equal(load_file(tmp_path / "new" / index["weight_map"][name])[name], tensor)


def test_no_room_is_known_before_anything_is_written(tmp_path: Path) -> None:
    huge = ExportPlan([split("ours", "theirs", (1 << 40, 1 << 10), dim=0)], dtype)  # 2^51 bytes
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        huge.create(tmp_path)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
