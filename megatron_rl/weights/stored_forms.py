"""The forms in which a checkpoint holds a weight: as it is, in float8 with a scale per block, in MXFP4.

    plain      one tensor
    float8     `<name>` in E4M3 and `<name>_scale_inv`: each block of 128 x 128 elements is multiplied by its scale.
               Source: DeepSeek-V3, arXiv:2412.19437, section 3.3
    MXFP4      `<name>_blocks` and `<name>_scales` of stacked experts: 32 elements of a row, in E2M1, share a power of
               two. Source: OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1; GPT-OSS, arXiv:2508.10925

What is packed is unpacked while it is copied, a few rows at a time, in float32, where every product of a code and its
scale is exact; the shard's dtype rounds it once, bfloat16 not at all.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.models.tensor_map import Run, TensorMap
from megatron_rl.weights.runs import matrix, rows
from megatron_rl.weights.safetensors_format import StoredTensor

FP8_BLOCK = 128
"""Rows and columns that share a scale."""
MXFP4_BLOCK = 32
"""Elements of a row that share a scale."""
FLOATS = ("F32", "BF16", "F16")
_ELEMENTS_AT_ONCE = 1 << 20
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_CODES = torch.cat([_E2M1, -_E2M1])
_BYTES = torch.arange(256)
_PAIRS = torch.stack([_CODES[_BYTES % 16], _CODES[_BYTES // 16]], dim=1)
"""[256, 2]: the elements that a byte holds; the low half comes first."""
_SCALES = torch.tensor([2.0 ** (exponent - 127) for exponent in range(255)] + [torch.nan])
"""[256]: what a byte of scale stands for, E8M0."""


class Form(Protocol):
    """One weight as a checkpoint holds it."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """What it is made of, by name."""
        ...

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise UserError, which names file and tensor, unless it is a weight of this shape."""
        ...

    def copy(self, tensor_map: TensorMap, run: Run, into: Tensor) -> None:
        """Copy a run of its matrix, as the table counts them."""
        ...


def form_of(name: str, tensors: Mapping[str, StoredTensor]) -> Form | None:
    """The form in which a weight is held; None: it is not."""
    if name in tensors:
        return Float8(name, tensors) if tensors[name].dtype == "F8_E4M3" else Plain(name, tensors)
    return Mxfp4(name, tensors) if f"{name}_blocks" in tensors else None


class Plain:
    """One tensor."""

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.name, self.tensor = name, tensors[name]
        self.tensors = {name: self.tensor}

    def check(self, shape: tuple[int, ...]) -> None:
        """See `Form`."""
        _check_shape(self.name, self.tensor, shape)
        if self.tensor.dtype not in FLOATS:
            allowed = f"{', '.join(FLOATS)}, F8_E4M3 with '{self.name}_scale_inv', MXFP4 in '{self.name}_blocks'"
            raise UserError(
                f"{self.tensor.file}: tensor '{self.name}' has dtype {self.tensor.dtype}, allowed: {allowed}"
            )

    def copy(self, tensor_map: TensorMap, run: Run, into: Tensor) -> None:
        """See `Form`."""
        into.copy_(rows(matrix(tensor_map, self.tensor.view()), tensor_map.dim, run))


class Float8:
    """Codes, and a scale for each block."""

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.name, self.codes, self.scale_name = name, tensors[name], f"{name}_scale_inv"
        self.scales = tensors.get(self.scale_name)
        self.tensors = {name: self.codes}
        if self.scales is not None:
            self.tensors[self.scale_name] = self.scales

    def check(self, shape: tuple[int, ...]) -> None:
        """See `Form`."""
        _check_shape(self.name, self.codes, shape)
        blocks = tuple(-(-size // FP8_BLOCK) for size in shape)
        scale = self.scales
        if scale is None or scale.shape != blocks or scale.dtype not in FLOATS:
            found = "is missing" if scale is None else f"has shape {scale.shape} and dtype {scale.dtype}"
            raise UserError(
                f"{self.codes.file}: tensor '{self.scale_name}' {found}; needed beside F8_E4M3: {blocks}, "
                f"a scale for each {FP8_BLOCK} x {FP8_BLOCK} block"
            )

    def copy(self, tensor_map: TensorMap, run: Run, into: Tensor) -> None:
        """See `Form`."""
        assert self.scales is not None
        assert tensor_map.index is None
        assert not tensor_map.transposed
        assert run.step == 1
        values = rows(self.codes.view(), tensor_map.dim, run)
        offset = [0, 0]
        offset[tensor_map.dim] = run.start
        row_block = (offset[0] + torch.arange(values.shape[0])) // FP8_BLOCK
        column_block = (offset[1] + torch.arange(values.shape[1])) // FP8_BLOCK
        by_column = self.scales.view().float()[:, column_block]
        for part in _parts(values.shape):
            into[part].copy_(values[part].float() * by_column[row_block[part]])


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
        """See `Form`."""
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

    def copy(self, tensor_map: TensorMap, run: Run, into: Tensor) -> None:
        """See `Form`."""
        assert self.scales is not None
        assert tensor_map.index is not None
        assert tensor_map.transposed
        blocks, scales = self.blocks.view()[tensor_map.index], self.scales.view()[tensor_map.index]
        columns = slice(None)
        if tensor_map.dim == 0:
            blocks, scales = rows(blocks, 0, run), rows(scales, 0, run)
        else:
            assert run.step == 1
            columns = slice(run.start, run.start + run.size)
        for part in _parts((blocks.shape[0], blocks.shape[1] * MXFP4_BLOCK)):
            values = _PAIRS[blocks[part].long()].flatten(-2) * _SCALES[scales[part].long()][..., None]
            into[part].copy_(values.flatten(1)[:, columns])


def _check_shape(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(f"{tensor.file}: tensor '{name}' has shape {tensor.shape}, config.json implies {shape}")


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a matrix, so many at a time that what is unpacked stays small."""
    step = max(1, _ELEMENTS_AT_ONCE // max(1, shape[1]))
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))
