"""The tensors of a Hugging Face checkpoint folder, and whether they are the model of config.json; from headers alone.

A weight may be stored quantised (`stored_forms.py`). Some tensors are skipped: an output layer beside the embedding
that it is tied to, and buffers of older writers that follow from config.json. The layers after the last one that
predict further tokens (DeepSeek-V3) are no part of the policy: they are not read, trained or exported, and
`HFCheckpointFiles.left_out` says so to the user.

Without torch, so that a run can begin with it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import read_json_object
from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.weights.files.stored_forms import Form, StoredTensor, form_of, stored_tensors

INDEX = "model.safetensors.index.json"
_UNREAD = re.compile(r"^lm_head\.weight$|\.rotary_emb\.inv_freq$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class HFCheckpointFiles:
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

    def form(self, name: str) -> Form | None:
        """The form in which a weight is stored; None: it is not."""
        return form_of(name, self.tensors)

    def check(self, maps: Sequence[TensorMap]) -> None:
        """Compare the files with a family's table.

        Raises:
            UserError: a tensor is missing, unknown, or of a wrong shape or dtype; it is named with its file.
        """
        expected = {name: shape for tensor_map in maps for name, shape in tensor_map.hf_shapes.items()}
        forms = {name: self.form(name) for name in expected}
        read = {part for form in forms.values() if form is not None for part in form.tensors}
        further = self.layers_that_predict_further()
        for extra in sorted(self.tensors.keys() - read):
            layer = _LAYER.match(extra)
            if not (_UNREAD.search(extra) or (layer and int(layer[1]) in further)):
                file = self.tensors[extra].file
                raise UserError(f"{file}: tensor '{extra}' is unknown to the model of config.json")
        for name, shape in expected.items():
            form = forms[name]
            if form is None:
                raise UserError(f"{self.folder}: tensor '{name}' is missing, which the model of config.json has")
            form.check(shape)

    def layers_that_predict_further(self) -> range:
        """Numbers of the layers after the last that config.json counts by themselves."""
        if not (self.folder / "config.json").is_file():
            return range(0)
        hf = read_json_object(self.folder / "config.json", "config.json")
        last = hf.get("num_hidden_layers", 0)
        return range(last, last + (hf.get("num_nextn_predict_layers") or 0))

    def left_out(self) -> str | None:
        """One line for the user about layers that are in the files and not read; None: there are none."""
        held = [
            n for n in self.layers_that_predict_further() if any(t.startswith(f"model.layers.{n}.") for t in self.names)
        ]
        if not held:
            return None
        return (
            f"{self.folder}: layers {held[0]} to {held[-1]}, which predict further tokens, are not read: they are "
            "neither trained nor exported, and an export's config.json says num_nextn_predict_layers 0"
        )
