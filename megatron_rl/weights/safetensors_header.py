"""What a safetensors file holds, from its header alone: 8 bytes of header length, a JSON header, the tensors' bytes.

Without torch, so that a run can begin with it. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError

ITEM_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
"""Bytes of an element, by the format's names; a tensor of another dtype is not read."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name, from its header.

    Raises:
        UserError: the file is truncated, or its header is damaged or does not describe its bytes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else math.inf
        if 8 + length > size:
            raise UserError(f"{file}: not a complete safetensors file: {size} bytes end in its header")
        try:
            header: dict[str, Any] = json.loads(stream.read(int(length)))
            header.pop("__metadata__", None)
            tensors = {name: _stored(file, 8 + int(length), entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file}: not a safetensors file: its header is damaged ({error})") from None
    for name, tensor in tensors.items():
        if tensor.start + tensor.num_bytes > size:
            raise UserError(f"{file}: not a complete safetensors file: tensor '{name}' ends beyond its {size} bytes")
        if tensor.num_bytes != math.prod(tensor.shape) * ITEM_SIZES.get(tensor.dtype, 0) and tensor.dtype in ITEM_SIZES:
            raise UserError(f"{file}: tensor '{name}' of shape {tensor.shape} has {tensor.num_bytes} bytes")
    return tensors


def _stored(file: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"offsets {begin} to {end}, shape {shape}")
    return StoredTensor(file, str(entry["dtype"]), shape, data + begin, end - begin)
