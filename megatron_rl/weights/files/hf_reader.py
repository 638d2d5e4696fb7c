"""Hugging Face checkpoints, read by slice: every rank maps the files and copies what it holds, and nothing else.

`copy_row_range` copies one row range of a stored matrix and dequantises it, whatever its stored form
(`stored_forms.py`); `HFCheckpointReader` fills shards with it. Quantised weights are dequantised a few rows at a
time in float32, where every product of a code and its scale is exact; the cast to the shard's dtype rounds once,
bfloat16 not at all.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rl.models.tensor_map import RowRange, TensorMap
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.files.hf_checkpoint import HFCheckpointFiles
from megatron_rl.weights.files.local_shards import (
    Place,
    check_table,
    local_parameters,
    matrix,
    rows,
    shard_parts,
)
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


def copy_row_range(form: Form, tensor_map: TensorMap, row_range: RowRange, into: Tensor) -> None:
    """Copy a row range of a weight's matrix from the form in which it is stored."""
    match form:
        case Plain():
            into.copy_(rows(matrix(tensor_map, mapped(form.tensor)), tensor_map.dim, row_range))
        case Float8():
            _copy_float8(form, tensor_map, row_range, into)
        case Mxfp4():
            _copy_mxfp4(form, tensor_map, row_range, into)


def _copy_float8(form: Float8, tensor_map: TensorMap, row_range: RowRange, into: Tensor) -> None:
    assert form.scales is not None
    assert tensor_map.index is None
    assert not tensor_map.transposed
    assert row_range.step == 1
    values = rows(mapped(form.codes), tensor_map.dim, row_range)
    offset = [0, 0]
    offset[tensor_map.dim] = row_range.start
    row_block = (offset[0] + torch.arange(values.shape[0])) // FP8_BLOCK
    column_block = (offset[1] + torch.arange(values.shape[1])) // FP8_BLOCK
    by_column = mapped(form.scales).float()[:, column_block]
    for part in _parts(values.shape):
        into[part].copy_(values[part].float() * by_column[row_block[part]])


def _copy_mxfp4(form: Mxfp4, tensor_map: TensorMap, row_range: RowRange, into: Tensor) -> None:
    assert form.scales is not None
    assert tensor_map.index is not None
    assert tensor_map.transposed
    blocks, scales = mapped(form.blocks)[tensor_map.index], mapped(form.scales)[tensor_map.index]
    columns = slice(None)
    if tensor_map.dim == 0:
        blocks, scales = rows(blocks, 0, row_range), rows(scales, 0, row_range)
    else:
        assert row_range.step == 1
        columns = slice(row_range.start, row_range.start + row_range.size)
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
            for piece in shard_parts(tensor_map, rank, size, target):
                if piece.row_range.hf_name is None:
                    piece.shard.zero_()
                    continue
                form = self.form(piece.row_range.hf_name)
                assert form is not None, f"{piece.row_range.hf_name}: not checked before it is read"
                copy_row_range(form, tensor_map, piece.row_range, piece.shard)

    @torch.no_grad()
    def read_shards(self, parameters: Mapping[str, Tensor], maps: Sequence[TensorMap], place: Place) -> None:
        """Fill a rank's parameters, by their names in the table; those that the rank does not have are passed over."""
        for tensor_map in maps:
            if tensor_map.name in parameters:
                self.read_shard(tensor_map, *place.in_group_of(tensor_map), parameters[tensor_map.name])

    @torch.no_grad()
    def read_tied_embedding(self, model: Any, maps: Sequence[TensorMap], place: Place) -> None:
        """The last pipeline stage's copy of a tied embedding holds the same rows as the first stage's."""
        if model.share_embeddings_and_output_weights and model.post_process and not model.pre_process:
            embedding = next(m for m in maps if m.name == "embedding.word_embeddings.weight")
            self.read_shard(embedding, *place.tp, model.output_layer.weight)


def load_hf_weights(models: Sequence[nn.Module], maps: Sequence[TensorMap], groups: Groups, folder: str | Path) -> None:
    """Fill this rank's GPTModels from a Hugging Face checkpoint, reading only what they hold.

    Args:
        models: this rank's chunks, first one first, not yet wrapped; parameters of any floating dtype.
        maps: the family's table.
        groups: of this rank.
        folder: of the checkpoint.

    Raises:
        UserError: a tensor is missing, unknown or of the wrong shape, or a file is corrupt.
    """
    reader, place, parameters = HFCheckpointReader(folder), Place.of(groups), local_parameters(models)
    reader.check(maps)
    check_table(parameters, maps, place)
    left_out = reader.left_out()
    if left_out is not None and groups.world.rank() == 0:
        print(f"megatron-rl: {left_out}", file=sys.stderr, flush=True)
    reader.read_shards(parameters, maps, place)
    reader.read_tied_embedding(models[-1], maps, place)
