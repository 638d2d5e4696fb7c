"""Which files of a folder are the model's: every combination of layouts, against what transformers loads."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import check_weights
from megatron_rl.weights.files.hf_checkpoint import HFCheckpointFiles
from megatron_rl.weights.files.safetensors_files import mapped
from tests import checkpoints

NAME = "model.norm.weight"
OTHERS = ("model.safetensors", "shards", "adapter", "macos", "consolidated", "twice")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_checkpoint(tmp_path_factory.mktemp("source"), "qwen2", seed=1)


def _write(folder: Path, source: Path, layout: tuple[str, ...]) -> None:
    held = load_file(source / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())

    def save(name: str, factor: float, part: slice = slice(None)) -> list[str]:
        names = sorted(held)[part]
        save_file({n: factor * held[n] for n in names}, folder / name, metadata={"format": "pt"})
        return names

    if "model.safetensors" in layout:
        save("model.safetensors", 2.0)
    if "shards" in layout:
        parts = {f"model-0000{i + 1}-of-00002.safetensors": slice(i, None, 2) for i in range(2)}
        weight_map = {n: file for file, part in parts.items() for n in save(file, 3.0, part)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if "adapter" in layout:
        save("adapter_model.safetensors", 5.0)
    if "macos" in layout:
        (folder / "._model.safetensors").write_bytes(b"\0" * 64)
    if "consolidated" in layout:
        save("consolidated.safetensors", 7.0)
    if "twice" in layout:
        save("model-extra.safetensors", 11.0, slice(0, 1))


LAYOUTS = [layout for k in range(1, len(OTHERS) + 1) for layout in itertools.combinations(OTHERS, k)]


@pytest.mark.parametrize("layout", LAYOUTS, ids="+".join)
def test_the_files_that_are_read_are_those_of_transformers(layout: tuple[str, ...], source: Path, tmp_path: Path):
    _write(tmp_path, source, layout)
    refusal = None
    try:
        check_weights(tmp_path)
        files = HFCheckpointFiles(tmp_path)
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert any(said in refusal for said in ("model.safetensors", "no weights", "model-extra"))
        refused = {"model.safetensors", "shards"} <= set(layout) or not {"model.safetensors", "shards"} & set(layout)
        assert refused or ("twice" in layout and "shards" not in layout)
        return
    if NAME not in files.names:  # one stray tensor is no model; `check` says what is missing
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = model.get_parameter(NAME)
    torch.testing.assert_close(mapped(files.tensors[NAME]), expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_stored_output_layer_of_a_tied_model_is_the_embedding_or_refused(factor: float, tmp_path: Path) -> None:
    from megatron_rl.models.families import family_of

    folder = checkpoints.make_checkpoint(tmp_path, "qwen2_tied", seed=1)
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = factor * held["model.embed_tokens.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((folder / "config.json").read_text())
    files, maps = HFCheckpointFiles(folder), family_of(hf).tensor_maps(hf)
    if factor == 1.0:
        files.check(maps)
        return
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from .* tie_word_embeddings"):
        files.check(maps)
