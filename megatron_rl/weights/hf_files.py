"""Hugging Face checkpoint folders: written to a temporary folder that is renamed when it is complete.

`write_hf_checkpoint` writes whole tensors, one after another, in one process; `sharded_export` writes what each rank
holds, and completes its folder here too.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.weights.hf_checkpoint_files import INDEX

# Weights in any format: beside new ones they would be old ones.
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
    write_index(folder, {name: final[number] for name, number in file_of.items()}, total_bytes)


def write_index(folder: Path, file_of: dict[str, str], total_bytes: int) -> None:
    """The index of a checkpoint in several files: which file holds each tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
