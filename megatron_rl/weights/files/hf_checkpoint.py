"""The tensors of a Hugging Face checkpoint folder, and whether they are the model of config.json; from headers alone.

A weight may be stored quantised (`stored_forms.py`). Some tensors are skipped: an output layer that is tied to the
embedding and equal to it, and buffers of older writers that follow from config.json. The layers after the last one that
predict further tokens (DeepSeek-V3) are no part of the policy: they are not read, trained or exported, and
`HFCheckpointFiles.left_out` says so to the user.

Without torch, so that a run can begin with it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import files_of_weights, read_json_object
from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.weights.files.stored_forms import Form, StoredTensor, form_of, stored_tensors

INDEX = "model.safetensors.index.json"
_UNREAD = re.compile(r"^lm_head\.weight$|\.rotary_emb\.inv_freq$")
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BYTES_AT_ONCE = 1 << 24
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.num_bytes
        while left:
            size = min(left, _BYTES_AT_ONCE)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


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
            held = stored_tensors(file)
            if twice := sorted(held.keys() & self.tensors.keys()):
                raise UserError(
                    f"tensor '{twice[0]}' is in {self.tensors[twice[0]].file} and in {file}; "
                    "allowed: one file for each tensor"
                )
            self.tensors |= held

    def _files(self) -> list[Path]:
        names = sorted(files_of_weights(self.folder, str(self.folder)))
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
        self._check_tied(expected)

    def _check_tied(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError for an output layer that is tied to the embedding and is stored as another matrix.

        transformers takes the stored one, vLLM the embedding.
        """
        output, embedding = (self.tensors.get(name) for name in (_OUTPUT, _EMBEDDING))
        is_tied = _EMBEDDING in expected and _OUTPUT not in expected and "score.weight" not in expected
        if is_tied and output is not None and embedding is not None and not _equal(output, embedding):
            raise UserError(
                f"{output.file}: '{_OUTPUT}' differs from '{_EMBEDDING}', but tie_word_embeddings is true in "
                "config.json; allowed: tie_word_embeddings false, or no stored lm_head.weight"
            )

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
