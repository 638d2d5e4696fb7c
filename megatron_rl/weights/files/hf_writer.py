"""Writing Hugging Face checkpoint folders, in a temporary folder that is renamed when it is complete.

`write_hf_checkpoint` writes whole tensors, one after another, in one process. With `ExportPlan` and `ShardWriter` all
ranks write at once, and no tensor is sent: names, dtypes and shapes say where every element lies in the files before
one is written. So one rank lays out the files at full size, and each rank writes the row ranges of its shards in place.
A row range of a matrix that is split by columns is a part of every row. What several ranks hold alike is written by one
of them, in turns. The file system must be shared by all ranks, as it is for training checkpoints.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.weights.files.hf_checkpoint import INDEX
from megatron_rl.weights.files.local_shards import ShardPart, rows, shard_parts
from megatron_rl.weights.files.safetensors_files import PlannedFile, create_file, plan_file, write_at
from megatron_rl.weights.quantized.fp8_parameters import dequantized

# Weights in any format: beside new ones they would be old ones.
_OF_OTHERS = ("._", "adapter_")
"""Beginnings of files that are no part of the model: macOS's, and those of an adapter, whose weights stay behind."""
_TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's further chat templates."""
_NOT_COPIED = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz"),
    ".index.json",
)


def write_hf_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: Path,
    config: dict[str, Any] | None = None,
    max_file_bytes: int = 5 << 30,
) -> None:
    """Write a Hugging Face checkpoint: safetensors with an index, and everything else of `source` but its weights.

    Args:
        folder: created; an older one is replaced when the new one is complete.
        tensors: (name, tensor), consumed lazily; at most `max_file_bytes` of them are held.
        source: checkpoint folder whose config, tokenizer and other files are copied.
        config: written as config.json in the place of the source's.
        max_file_bytes: size of one safetensors file.
    """
    partial = begin(folder)
    held: dict[str, Tensor] = {}
    file_of: dict[str, int] = {}
    num_files = held_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal num_files, held_bytes
        num_files += 1
        save_file(held, partial / _part(num_files), metadata={"format": "pt"})
        file_of.update(dict.fromkeys(held, num_files))
        held.clear()
        held_bytes = 0

    for name, tensor in tensors:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if held and held_bytes + tensor_bytes > max_file_bytes:
            flush()
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held_bytes += tensor_bytes
        total_bytes += tensor_bytes
    flush()
    _name_files(partial, file_of, num_files, total_bytes)
    complete(partial, folder, source=source, config=config)


def begin(folder: Path) -> Path:
    """An empty temporary folder in which `folder` is to be written; what an earlier attempt left is deleted."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def complete(partial: Path, folder: Path, *, source: Path, config: dict[str, Any] | None) -> None:
    """Put everything of `source` but its weights beside the new ones, and the result in the place of `folder`."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_NOT_COPIED) and not file.name.startswith(_OF_OTHERS):
            shutil.copyfile(file, partial / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, partial / _TEMPLATES, dirs_exist_ok=True)
    if config is not None:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _name_files(folder: Path, file_of: dict[str, int], num_files: int, total_bytes: int) -> None:
    if num_files == 1:
        os.replace(folder / _part(1), folder / "model.safetensors")
        return
    final = {number: f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)}
    for number, name in final.items():
        os.replace(folder / _part(number), folder / name)
    write_index(folder, {name: final[number] for name, number in file_of.items()}, total_bytes)


def write_index(folder: Path, file_of: dict[str, str], total_bytes: int) -> None:
    """The index of a checkpoint in several files: which file holds each tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class ExportPlan:
    """Files and places of the tensors of a table.

    Attributes:
        files: in the order of the table.
        num_bytes: of all tensors.
    """

    def __init__(
        self, maps: Sequence[TensorMap], dtype_of: Callable[[str], torch.dtype], *, max_file_bytes: int = 5 << 30
    ) -> None:
        """Args:
        maps: the family's table.
        dtype_of: dtype in which a Hugging Face tensor is written.
        max_file_bytes: of the tensors of one file; a larger tensor has a file of its own.
        """
        self.tensors = {
            name: (dtype_of(name), shape) for tensor_map in maps for name, shape in tensor_map.hf_shapes.items()
        }
        parts: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = []
        room = self.num_bytes = 0
        for name, (dtype, shape) in self.tensors.items():
            size = math.prod(shape) * dtype.itemsize
            if not parts or size > room:
                parts.append({})
                room = max_file_bytes
            parts[-1][name] = (dtype, shape)
            room -= size
            self.num_bytes += size
        self.files: list[PlannedFile] = [plan_file(_file_name(i, len(parts)), part) for i, part in enumerate(parts)]

    def create(self, folder: Path) -> None:
        """Lay the files out.

        Raises:
            OSError: there is no room for them.
        """
        for file in self.files:
            create_file(folder, file)
        if len(self.files) > 1:
            write_index(folder, {name: file.name for file in self.files for name in file.offsets}, self.num_bytes)


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


class ShardWriter:
    """Writes shards into the files of a plan; a context manager."""

    def __init__(self, plan: ExportPlan, folder: Path) -> None:
        self.tensors = plan.tensors
        self._place: Mapping[str, tuple[Path, int]] = {
            name: (folder / file.name, offset) for file in plan.files for name, offset in file.offsets.items()
        }
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def write(self, tensor_map: TensorMap, rank: int, size: int, shard: Tensor) -> None:
        """Write the shard of `rank` of `size`; padding is left out."""
        pieces: dict[str, list[ShardPart]] = {}
        for piece in shard_parts(tensor_map, rank, size, dequantized(shard, torch.float32)):
            if piece.row_range.hf_name is not None:
                pieces.setdefault(piece.row_range.hf_name, []).append(piece)
        for name, of_tensor in pieces.items():
            for first, values in _joined(of_tensor, tensor_map.dim):
                self._write(tensor_map, name, first, values.to(device="cpu", dtype=self.tensors[name][0]))

    def _write(self, tensor_map: TensorMap, name: str, first: int, values: Tensor) -> None:
        """Write consecutive rows (along the map's dimension) of a Hugging Face matrix, from row `first`."""
        shape = tensor_map.matrix_shape(name)
        dim, itemsize = tensor_map.dim, values.element_size()
        if tensor_map.transposed:
            shape, dim, values = shape[::-1], len(shape) - 1 - dim, values.t()
        values = values.contiguous()
        descriptor, offset = self._descriptor(name)
        offset += (tensor_map.index or 0) * math.prod(shape) * itemsize
        if dim == 0:
            write_at(descriptor, values, offset + first * math.prod(shape[1:]) * itemsize)
        elif values.shape == shape:
            write_at(descriptor, values, offset)
        else:
            for row, part in enumerate(values):
                write_at(descriptor, part, offset + (row * shape[1] + first) * itemsize)

    def _descriptor(self, name: str) -> tuple[int, int]:
        file, offset = self._place[name]
        if file not in self._open:
            self._open[file] = os.open(file, os.O_WRONLY)
        return self._open[file], offset


def _joined(pieces: list[ShardPart], dim: int) -> list[tuple[int, Tensor]]:
    """Parts of one tensor, joined to one block of consecutive rows where they fill it: (first row, rows)."""
    first = min(piece.row_range.start for piece in pieces)
    end = max(piece.row_range.start + (piece.row_range.size - 1) * piece.row_range.step + 1 for piece in pieces)
    if len(pieces) == 1 or sum(piece.row_range.size for piece in pieces) != end - first:
        assert all(piece.row_range.step == 1 for piece in pieces), "rows that take turns are held together"
        return [(piece.row_range.start, piece.shard) for piece in pieces]
    shape = list(pieces[0].shard.shape)
    shape[dim] = end - first
    block = pieces[0].shard.new_empty(shape)
    for piece in pieces:
        row_range = piece.row_range
        in_block = replace(row_range, start=row_range.start - first)
        rows(block, dim, in_block).copy_(piece.shard)
    return [(first, block)]
