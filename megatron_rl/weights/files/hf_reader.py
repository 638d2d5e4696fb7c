"""Hugging Face checkpoints, read by slice: every rank maps the files and copies what it holds, and nothing else.

From what a checkpoint holds to the values it stands for: a run of a matrix, copied, and unpacked on the way.

What is packed is unpacked a few rows at a time, in float32, where every product of a code and its scale is exact; the
shard's dtype rounds it once, bfloat16 not at all. The forms are those of `stored_forms`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_rl.models.tensor_map import Run, TensorMap
from megatron_rl.weights.files.hf_checkpoint import HFCheckpointFiles
from megatron_rl.weights.files.local_shards import matrix, rows, runs_of_shard
from megatron_rl.weights.files.safetensors_files import mapped
from megatron_rl.weights.files.stored_forms import FP8_BLOCK, MXFP4_BLOCK, Float8, Form, Mxfp4, Plain
from megatron_rl.weights.quantized.fp8_parameters import fillable

_ELEMENTS_AT_ONCE = 1 << 20
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_CODES = torch.cat([_E2M1, -_E2M1])
_BYTES = torch.arange(256)
_PAIRS = torch.stack([_CODES[_BYTES % 16], _CODES[_BYTES // 16]], dim=1)
"""[256, 2]: the elements that a byte holds; the low half comes first."""
_SCALES = torch.tensor([2.0 ** (exponent - 127) for exponent in range(255)] + [torch.nan])
"""[256]: what a byte of scale stands for, E8M0."""


def copy_run(form: Form, tensor_map: TensorMap, run: Run, into: Tensor) -> None:
    """Copy a run of the matrix of a weight, as the table counts them, from the form in which it is held."""
    match form:
        case Plain():
            into.copy_(rows(matrix(tensor_map, mapped(form.tensor)), tensor_map.dim, run))
        case Float8():
            _copy_float8(form, tensor_map, run, into)
        case Mxfp4():
            _copy_mxfp4(form, tensor_map, run, into)


def _copy_float8(form: Float8, tensor_map: TensorMap, run: Run, into: Tensor) -> None:
    assert form.scales is not None
    assert tensor_map.index is None
    assert not tensor_map.transposed
    assert run.step == 1
    values = rows(mapped(form.codes), tensor_map.dim, run)
    offset = [0, 0]
    offset[tensor_map.dim] = run.start
    row_block = (offset[0] + torch.arange(values.shape[0])) // FP8_BLOCK
    column_block = (offset[1] + torch.arange(values.shape[1])) // FP8_BLOCK
    by_column = mapped(form.scales).float()[:, column_block]
    for part in _parts(values.shape):
        into[part].copy_(values[part].float() * by_column[row_block[part]])


def _copy_mxfp4(form: Mxfp4, tensor_map: TensorMap, run: Run, into: Tensor) -> None:
    assert form.scales is not None
    assert tensor_map.index is not None
    assert tensor_map.transposed
    blocks, scales = mapped(form.blocks)[tensor_map.index], mapped(form.scales)[tensor_map.index]
    columns = slice(None)
    if tensor_map.dim == 0:
        blocks, scales = rows(blocks, 0, run), rows(scales, 0, run)
    else:
        assert run.step == 1
        columns = slice(run.start, run.start + run.size)
    for part in _parts((blocks.shape[0], blocks.shape[1] * MXFP4_BLOCK)):
        values = _PAIRS[blocks[part].long()].flatten(-2) * _SCALES[scales[part].long()][..., None]
        into[part].copy_(values.flatten(1)[:, columns])


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a matrix, so many at a time that what is unpacked stays small."""
    step = max(1, _ELEMENTS_AT_ONCE // max(1, shape[1]))
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


class HFCheckpointReader(HFCheckpointFiles):
    """The tensors of a checkpoint folder."""

    def read_shard(self, tensor_map: TensorMap, rank: int, size: int, into: Tensor) -> None:
        """Fill the Megatron shard of `rank` of `size` from its slices; the padded vocabulary is zero."""
        with fillable(into) as target:
            for piece in runs_of_shard(tensor_map, rank, size, target):
                if piece.run.hf_name is None:
                    piece.shard.zero_()
                    continue
                form = self.form(piece.run.hf_name)
                assert form is not None, f"{piece.run.hf_name}: not checked before it is read"
                copy_run(form, tensor_map, piece.run, piece.shard)
