"""Whether a checkpoint in torch_dist format is complete and undamaged, before any of it is loaded.

Such a checkpoint is a folder: `.metadata` is the index, which says where in the `*.distcp` files the pieces of every
tensor lie; `common.pt` holds what all ranks share (from core 0.19 on an entry of the index, `common_state`);
`metadata.json` names the format. A loader that meets a damaged file fails somewhere inside, on some ranks only, or
hangs. Comparing sizes with the index costs a millisecond, gives the same answer on every rank and can name the file.

Contents are compared with `digests.json`, which the writer adds last: the SHA-256 of every file. Reading all files
takes as long as loading them, so each rank reads a part, and only a run that resumes does it.

The index is a pickle. It may come from elsewhere, so it is read here by an unpickler that builds nothing but the data
classes of torch.distributed.checkpoint.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.checkpoint.folders import CheckpointError

_INDEX, _FORMAT, _COMMON, _COMMON_ENTRY = ".metadata", "metadata.json", "common.pt", "common_state/"
_READ_ERRORS = (
    CheckpointingException,
    CheckpointException,  # torch's is a BaseException: it would pass an `except Exception`
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    KeyError,
    ValueError,
)


DIGESTS = "digests.json"
"""By file name: {'bytes', 'sha256'}."""


def digest(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def write_digests(folder: Path, known: list[dict[str, dict[str, Any]]]) -> None:
    """Write digests.json.

    Args:
        folder: of one iteration, complete but for it.
        known: digests that the ranks took of the files they wrote; the others' are taken here.
    """
    digests = {name: value for of_rank in known for name, value in of_rank.items()}
    for file in folder.iterdir():
        if file.name not in digests:
            digests[file.name] = digest(file)
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


def check_digests(folder: Path, *, part: int = 0, num_parts: int = 1) -> None:
    """Compare the content of a part of the files with their digests; a checkpoint without them passes.

    Raises:
        CheckpointError: a file is not what was written; it is named.
    """
    if not (folder / DIGESTS).exists():  # one that was converted, or comes from another program
        return
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        for name in sorted(digests)[part::num_parts]:
            _require(folder, name)
            if digest(folder / name) != digests[name]:
                raise CheckpointError(f"{folder / name} is not what was written: its checksum differs")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / DIGESTS} cannot be checked: {type(error).__name__}: {error}") from error


def check_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Compare the files of a checkpoint with its index.

    Args:
        folder: of one iteration, `iter_0000010`.

    Returns:
        The shape of every tensor by its name in the checkpoint; the optimizer's, if there are any, among them.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or of another format; it is named.
    """
    _require(folder, _FORMAT)
    try:
        backend = json.loads((folder / _FORMAT).read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _FORMAT} is damaged: {type(error).__name__}: {error}") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{folder} has the format '{backend}'; allowed: torch_dist")
    _require(folder, _INDEX)
    index = _read_index(folder / _INDEX)
    if (folder / _COMMON).exists() or not any(name.startswith(_COMMON_ENTRY) for name in index.state_dict_metadata):
        _require(folder, _COMMON)
        if not zipfile.is_zipfile(folder / _COMMON):  # torch.save's files are, and their directory is at the end
            raise CheckpointError(f"{folder / _COMMON} is truncated or damaged")
    ends: dict[str, int] = {}
    for piece in index.storage_data.values():
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, which {_INDEX} promises")
        size = (folder / name).stat().st_size
        if size < end:
            raise CheckpointError(f"{folder / name} is truncated: {size} bytes, but {_INDEX} says {end}")
    return {name: tuple(entry.size) for name, entry in index.state_dict_metadata.items() if hasattr(entry, "size")}


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of every tensor of a checkpoint that `check_files` has passed, by name."""
    index = _read_index(folder / _INDEX)
    entries = index.state_dict_metadata.items()
    return {name: entry.properties.dtype for name, entry in entries if hasattr(entry, "properties")}


def _require(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name} is missing; a checkpoint in torch_dist format has it")


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Inside the context, what core or torch raise because of the checkpoint's content becomes a CheckpointError."""
    try:
        yield
    except _READ_ERRORS as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {str(error)[:300]}") from error


class _IndexUnpickler(pickle.Unpickler):
    """Builds the data classes and enums of torch.distributed.checkpoint, sizes and dtypes; refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("torch", "Size"), ("torch.serialization", "_get_layout")}:
            return super().find_class(module, name)
        # A dotted name would reach through a class or module to any function.
        if "." not in name and (module == "torch" or module.startswith("torch.distributed.checkpoint.")):
            found = super().find_class(module, name)
            of_index = isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
            if isinstance(found, torch.dtype) or (module != "torch" and of_index):
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")


def _read_index(file: Path) -> Any:
    """torch.distributed.checkpoint's Metadata."""
    try:
        with file.open("rb") as stream:
            return _IndexUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
