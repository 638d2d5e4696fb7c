"""Hugging Face safetensors files: read the slices that a rank holds, write whole checkpoints.

Nothing is ever unpickled. A write goes to a temporary folder that is renamed when it is complete.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.weights.fp8_parameters import fillable
from megatron_rl.weights.runs import matrix, rows, runs_of_shard

_INDEX = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


class HFCheckpointReader:
    """The tensors of a checkpoint folder, read by slice."""

    def __init__(self, folder: str | Path) -> None:
        """Index the folder's *.safetensors.

        Raises:
            UserError: no safetensors files, or one that is truncated or corrupt.
        """
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{self.folder}: no *.safetensors files; only safetensors checkpoints are read")
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{file}: not a complete safetensors file: {error}") from None
            self._files |= dict.fromkeys(handle.keys(), handle)

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._files)

    def check(self, maps: Sequence[TensorMap]) -> None:
        """Compare the files with a family's table.

        Raises:
            UserError: a tensor is missing, unknown or of the wrong shape; it is named.
        """
        expected = {name: shape for tensor_map in maps for name, shape in tensor_map.hf_shapes.items()}
        # A tied output layer may be stored again beside the embedding.
        extra = sorted(set(self._files) - set(expected) - {"lm_head.weight"})
        if extra:
            raise UserError(f"{self.folder}: tensor '{extra[0]}' is unknown to the model of config.json")
        for name, shape in expected.items():
            if name not in self._files:
                raise UserError(f"{self.folder}: tensor '{name}' is missing")
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != shape:
                raise UserError(f"{self.folder}: tensor '{name}' has shape {found}, config.json implies {shape}")

    def read_shard(self, tensor_map: TensorMap, tp_rank: int, tp_size: int, into: Tensor) -> None:
        """Fill a Megatron shard from the slices that it is made of; the padded vocabulary is zero."""
        with fillable(into) as target:
            for piece in runs_of_shard(tensor_map, tp_rank, tp_size, target):
                name = piece.run.hf_name
                if name is None:
                    piece.shard.zero_()
                elif tensor_map.index is None and not tensor_map.transposed and piece.run.step == 1:
                    between = slice(piece.run.start, piece.run.start + piece.run.size)
                    source = self._files[name].get_slice(name)
                    piece.shard.copy_(source[between] if tensor_map.dim == 0 else source[:, between])
                else:
                    whole = self._files[name].get_tensor(name)
                    piece.shard.copy_(rows(matrix(tensor_map, whole), tensor_map.dim, piece.run))


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
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
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
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_NOT_COPIED):
            shutil.copyfile(file, partial / file.name)
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
    weight_map = {name: final[number] for name, number in sorted(file_of.items())}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
