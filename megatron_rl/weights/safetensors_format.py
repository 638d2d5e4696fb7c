"""The safetensors format: 8 bytes of header length, a JSON header, the bytes of the tensors.

Reading maps the bytes of one tensor at a time, so that a slice costs the pages that it touches and nothing stays in
memory. Writing plans the whole file from names, dtypes and shapes before there is any tensor, so that every rank can
write what it holds into its place, all at once, without sending anything to anyone.

The plan of a file is the one of the safetensors library, byte for byte: tensors are ordered by dtype, then by name.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""The format's names; a tensor of another dtype is not read."""
_WRITTEN = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What is written, in the order of a file."""
_PAGE = mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int

    def view(self) -> Tensor:
        """The tensor, its pages read from the file when they are touched. The mapping ends with the last view of it."""
        assert self.num_bytes, f"{self.file}: a tensor of shape {self.shape} holds nothing"
        begin = self.start // _PAGE * _PAGE
        with self.file.open("rb") as stream:
            # A private mapping: torch wants memory that it could write to.
            mapped = mmap.mmap(
                stream.fileno(), self.start + self.num_bytes - begin, access=mmap.ACCESS_COPY, offset=begin
            )
        dtype = DTYPES[self.dtype]
        count = self.num_bytes // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=self.start - begin).view(self.shape)


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
        if tensor.dtype in DTYPES and tensor.num_bytes != math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize:
            raise UserError(f"{file}: tensor '{name}' of shape {tensor.shape} has {tensor.num_bytes} bytes")
    return tensors


def _stored(file: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"offsets {begin} to {end}, shape {shape}")
    return StoredTensor(file, str(entry["dtype"]), shape, data + begin, end - begin)


@dataclass(frozen=True)
class PlannedFile:
    """A file that is to be written."""

    name: str
    header: bytes
    num_bytes: int
    offsets: dict[str, int]
    """Offset of each tensor's first byte in the file."""


def plan_file(name: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> PlannedFile:
    """The file that holds these tensors, given the dtype and shape of each."""
    order = list(_WRITTEN)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for tensor in sorted(tensors, key=lambda tensor: (order.index(tensors[tensor][0]), tensor)):
        dtype, shape = tensors[tensor]
        offsets[tensor] = end
        end += math.prod(shape) * dtype.itemsize
        header[tensor] = {"dtype": _WRITTEN[dtype], "shape": list(shape), "data_offsets": [offsets[tensor], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return PlannedFile(
        name, struct.pack("<Q", len(text)) + text, start + end, {tensor: start + o for tensor, o in offsets.items()}
    )


def create_file(folder: Path, planned: PlannedFile) -> None:
    """Create the file with its header and room for its tensors.

    Raises:
        OSError: there is no room.
    """
    with (folder / planned.name).open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, planned.num_bytes)
        stream.write(planned.header)


def write_at(descriptor: int, values: Tensor, offset: int) -> None:
    """Write the elements of a contiguous host tensor at a byte of a file."""
    left = values.reshape(-1).view(torch.uint8).numpy().data
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
