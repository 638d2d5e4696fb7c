"""Hugging Face checkpoints, read by slice: every rank maps the files and copies what it holds, and nothing else.

A weight in float8 beside which the file holds `<name>_scale_inv` is one of DeepSeek's: each block of 128 x 128 elements
is to be multiplied by its scale. It is so while it is copied. Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import read_json_object
from megatron_rl.models.tensor_map import Run, TensorMap
from megatron_rl.weights.fp8_parameters import fillable
from megatron_rl.weights.hf_files import INDEX
from megatron_rl.weights.runs import matrix, rows, runs_of_shard
from megatron_rl.weights.safetensors_format import StoredTensor, stored_tensors

BLOCK = 128
"""Rows and columns that share a scale."""
_SCALE = "_scale_inv"
_WEIGHTS = ("F32", "BF16", "F16")
# A tied output layer may be stored again beside the embedding; writers of old stored what follows from config.json.
_UNREAD = re.compile(r"^lm_head\.weight$|\.rotary_emb\.inv_freq$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_ROWS_AT_ONCE = 8 * BLOCK


class HFCheckpointReader:
    """The tensors of a checkpoint folder."""

    def __init__(self, folder: str | Path) -> None:
        """Index the folder's *.safetensors.

        Raises:
            UserError: no safetensors files, or one that is truncated or corrupt.
        """
        self.folder = Path(folder)
        files = self._files()
        if not files:
            raise UserError(f"{self.folder}: no *.safetensors files; only safetensors checkpoints are read")
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            self.tensors |= stored_tensors(file)

    def _files(self) -> list[Path]:
        """Those of the index, if there is one: a folder may hold the same weights again in another layout."""
        index = self.folder / INDEX
        if not index.is_file():
            return sorted(self.folder.glob("*.safetensors"))
        names = sorted(set(read_json_object(index, str(self.folder)).get("weight_map", {}).values()))
        for name in names:
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name}: missing, which {INDEX} promises")
        return [self.folder / name for name in names]

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self.tensors)

    def check(self, maps: Sequence[TensorMap]) -> None:
        """Compare the files with a family's table.

        Raises:
            UserError: a tensor is missing, unknown, or of a wrong shape or dtype; it is named with its file.
        """
        expected = {name: shape for tensor_map in maps for name, shape in tensor_map.hf_shapes.items()}
        scales = {name + _SCALE for name in expected if self._is_quantized(name)}
        for extra in sorted(self.tensors.keys() - expected.keys() - scales):
            if not (_UNREAD.search(extra) or self._predicts_further(extra)):
                file = self.tensors[extra].file
                raise UserError(f"{file}: tensor '{extra}' is unknown to the model of config.json")
        for name, shape in expected.items():
            if name not in self.tensors:
                raise UserError(f"{self.folder}: tensor '{name}' is missing, which the model of config.json has")
            self._check_tensor(name, shape)

    def _predicts_further(self, name: str) -> bool:
        """Whether it belongs to one of the layers after the last, which predict further tokens (DeepSeek-V3)."""
        layer = _LAYER.match(name)
        if layer is None or not (self.folder / "config.json").is_file():
            return False
        hf = read_json_object(self.folder / "config.json", "config.json")
        last = hf.get("num_hidden_layers", 0)
        return bool(last <= int(layer[1]) < last + (hf.get("num_nextn_predict_layers") or 0))

    def _is_quantized(self, name: str) -> bool:
        return name in self.tensors and self.tensors[name].dtype == "F8_E4M3"

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise UserError(f"{tensor.file}: tensor '{name}' has shape {tensor.shape}, config.json implies {shape}")
        if not self._is_quantized(name):
            if tensor.dtype not in _WEIGHTS:
                allowed = f"{', '.join(_WEIGHTS)}, F8_E4M3 with '{name}{_SCALE}'"
                raise UserError(f"{tensor.file}: tensor '{name}' has dtype {tensor.dtype}, allowed: {allowed}")
            return
        scale = self.tensors.get(name + _SCALE)
        blocks = tuple(-(-size // BLOCK) for size in shape)
        if scale is None or scale.shape != blocks or scale.dtype not in _WEIGHTS:
            found = "is missing" if scale is None else f"has shape {scale.shape} and dtype {scale.dtype}"
            raise UserError(
                f"{tensor.file}: tensor '{name}{_SCALE}' {found}; needed beside F8_E4M3: {blocks}, "
                f"a scale for each {BLOCK} x {BLOCK} block"
            )

    def read_shard(self, tensor_map: TensorMap, rank: int, size: int, into: Tensor) -> None:
        """Fill the Megatron shard of `rank` of `size` from its slices; the padded vocabulary is zero."""
        with fillable(into) as target:
            for piece in runs_of_shard(tensor_map, rank, size, target):
                name = piece.run.hf_name
                if name is None:
                    piece.shard.zero_()
                    continue
                values = rows(matrix(tensor_map, self.tensors[name].view()), tensor_map.dim, piece.run)
                if self._is_quantized(name):
                    self._dequantize(tensor_map, piece.run, values, piece.shard)
                else:
                    piece.shard.copy_(values)

    def _dequantize(self, tensor_map: TensorMap, run: Run, values: Tensor, into: Tensor) -> None:
        assert tensor_map.index is None
        assert not tensor_map.transposed
        assert run.step == 1
        scales = self.tensors[f"{run.hf_name}{_SCALE}"].view().float()
        offset = [0, 0]
        offset[tensor_map.dim] = run.start
        columns = range(offset[1], offset[1] + values.shape[1])
        by_column = scales[:, [column // BLOCK for column in columns]]
        for first in range(0, len(values), _ROWS_AT_ONCE):
            part = values[first : first + _ROWS_AT_ONCE].float()
            block = [(offset[0] + first + row) // BLOCK for row in range(len(part))]
            into[first : first + len(part)].copy_(part * by_column[block])
