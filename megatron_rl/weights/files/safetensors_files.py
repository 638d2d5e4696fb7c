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

from megatron_rl.weights.files.stored_forms import StoredTensor

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
"""By the format's names."""
_WRITTEN = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What is written, in the order of a file."""
_PAGE = mmap.ALLOCATIONGRANULARITY


def mapped(stored: StoredTensor) -> Tensor:
    """The tensor, its pages read from the file when they are touched. The mapping ends with the last view of it."""
    assert stored.num_bytes, f"{stored.file}: a tensor of shape {stored.shape} holds nothing"
    begin = stored.start // _PAGE * _PAGE
    with stored.file.open("rb") as stream:
        # A private mapping: torch wants memory that it could write to.
        pages = mmap.mmap(
            stream.fileno(), stored.start + stored.num_bytes - begin, access=mmap.ACCESS_COPY, offset=begin
        )
    dtype = DTYPES[stored.dtype]
    count = stored.num_bytes // dtype.itemsize
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=stored.start - begin).view(stored.shape)


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
