"""The forms in which a checkpoint holds a weight: as it is, in float8 with a scale per block, in MXFP4.

    plain      one tensor
    float8     `<name>` in E4M3 and `<name>_scale_inv`: each block of 128 x 128 elements is multiplied by its scale.
               Source: DeepSeek-V3, arXiv:2412.19437, section 3.3
    MXFP4      `<name>_blocks` and `<name>_scales` of stacked experts: 32 elements of a row, in E2M1, share a power of
               two. Source: OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1; GPT-OSS, arXiv:2508.10925

This file finds the form from the headers alone, without torch; `hf_reader.py` reads it.
"""

import json
import math
import struct
from collections.abc import Mapping
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


FP8_BLOCK = 128
"""Rows and columns that share a scale."""
MXFP4_BLOCK = 32
"""Elements of a row that share a scale."""
FLOATS = ("F32", "BF16", "F16")


def form_of(name: str, tensors: Mapping[str, StoredTensor]) -> "Form | None":
    """The form in which a weight is stored; None: it is not."""
    if name in tensors:
        return Float8(name, tensors) if tensors[name].dtype == "F8_E4M3" else Plain(name, tensors)
    return Mxfp4(name, tensors) if f"{name}_blocks" in tensors else None


class Plain:
    """One tensor."""

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.name, self.tensor = name, tensors[name]
        self.tensors = {name: self.tensor}

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise UserError, which names file and tensor, unless it is a weight of this shape."""
        _check_shape(self.name, self.tensor, shape)
        if self.tensor.dtype not in FLOATS:
            allowed = f"{', '.join(FLOATS)}, F8_E4M3 with '{self.name}_scale_inv', MXFP4 in '{self.name}_blocks'"
            raise UserError(
                f"{self.tensor.file}: tensor '{self.name}' has dtype {self.tensor.dtype}, allowed: {allowed}"
            )


class Float8:
    """Codes, and a scale for each block."""

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.name, self.codes, self.scale_name = name, tensors[name], f"{name}_scale_inv"
        self.scales = tensors.get(self.scale_name)
        self.tensors = {name: self.codes}
        if self.scales is not None:
            self.tensors[self.scale_name] = self.scales

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise UserError, which names file and tensor, unless it is a weight of this shape."""
        _check_shape(self.name, self.codes, shape)
        if len(shape) != 2:
            raise UserError(f"{self.codes.file}: tensor '{self.name}' has dtype F8_E4M3, allowed: for matrices alone")
        blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
        scale = self.scales
        if scale is None or scale.shape != blocks or scale.dtype not in FLOATS:
            found = "is missing" if scale is None else f"has shape {scale.shape} and dtype {scale.dtype}"
            raise UserError(
                f"{self.codes.file}: tensor '{self.scale_name}' {found}; needed beside F8_E4M3: {blocks}, "
                f"a scale for each {FP8_BLOCK} x {FP8_BLOCK} block"
            )


class Mxfp4:
    """The matrices of all experts, each as rows of blocks: [experts, rows, blocks of a row, 16 bytes] and scales.

    The tensor that it stands for stacks the transposes, [experts, columns, rows].
    """

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.block_name, self.scale_name = f"{name}_blocks", f"{name}_scales"
        self.blocks, self.scales = tensors[self.block_name], tensors.get(self.scale_name)
        self.tensors = {self.block_name: self.blocks}
        if self.scales is not None:
            self.tensors[self.scale_name] = self.scales

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise UserError, which names file and tensor, unless it is a weight of this shape."""
        needed = (shape[0], shape[2], shape[1] // MXFP4_BLOCK) if len(shape) == 3 else shape
        for name, tensor, expected in (
            (self.block_name, self.blocks, (*needed, MXFP4_BLOCK // 2)),
            (self.scale_name, self.scales, needed),
        ):
            if tensor is None:
                raise UserError(f"{self.blocks.file}: tensor '{name}' is missing beside '{self.block_name}'")
            if len(shape) != 3 or shape[1] % MXFP4_BLOCK or tensor.shape != expected or tensor.dtype != "U8":
                found = f"has shape {tensor.shape} and dtype {tensor.dtype}"
                raise UserError(f"{tensor.file}: tensor '{name}' {found}, config.json implies {expected} and dtype U8")


def _check_shape(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(f"{tensor.file}: tensor '{name}' has shape {tensor.shape}, config.json implies {shape}")


Form = Plain | Float8 | Mxfp4
"""One weight as a checkpoint holds it: `tensors`, what it is made of by name, and `check`."""
