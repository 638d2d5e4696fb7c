"""Checkpoint folders: complete ones pass, every way of being incomplete is told from the headers alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.hf_checkpoint import check_tokenizer, check_weights, read_model_shape

HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 37,
    "max_position_embeddings": 128,
}


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_weights(folder)
    return str(caught.value).replace(str(folder), "F")


def tensors(*names: str) -> dict[str, np.ndarray]:
    return {name: np.arange(6, dtype=np.float32).reshape(2, 3) for name in names}


def test_a_complete_file_passes(tmp_path: Path) -> None:
    save_file(tensors("a", "b"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_weights(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors("a", "b"), file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert "is empty" in refused(tmp_path) if size == 0 else "is truncated" in refused(tmp_path)
    file.write_bytes(whole + b"\0")
    assert refused(tmp_path) == (
        f"model.hf_path: F/model.safetensors is damaged: {len(whole) + 1} bytes, but its header says {len(whole)}"
    )


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b"\xff\xff"])
def test_a_malformed_header_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert refused(tmp_path) == "model.hf_path: F/model.safetensors is no safetensors file: its header is malformed"


def test_every_file_and_tensor_of_an_index_must_be_there(tmp_path: Path) -> None:
    save_file(tensors("a"), tmp_path / "1.safetensors")
    save_file(tensors("b"), tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    check_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}))
    assert refused(tmp_path).startswith("model.hf_path: F/2.safetensors: tensor 'c' is missing")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "3.safetensors"}}))
    assert refused(tmp_path) == "model.hf_path: F/3.safetensors does not exist"
    index.write_text(json.dumps({"weight_map": {"a": "../1.safetensors"}}))
    assert "allowed: a file of the same folder" in refused(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith("model.hf_path: no weights in 'F'; needed: *.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert refused(tmp_path) == (
        "model.hf_path: only pickled weights such as pytorch_model.bin, never read, in 'F'; "
        "needed: *.safetensors, or model.load_weights=false"
    )


def test_the_shape_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    shape = read_model_shape(tmp_path)
    assert (shape.architecture, shape.num_key_value_heads, shape.max_position_embeddings) == (
        "Qwen3ForCausalLM",
        2,
        128,
    )
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in HF_CONFIG.items() if k != "num_key_value_heads"})
    )
    assert read_model_shape(tmp_path).num_key_value_heads == 4  # without groups, each head has keys of its own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is malformed JSON"),
        ("[]", "given list, allowed: a JSON object"),
        (json.dumps(HF_CONFIG | {"architectures": None}), "must name one; given None"),
        (json.dumps(HF_CONFIG | {"vocab_size": 0}), "given 0, allowed: an integer >= 1"),
        (json.dumps({"architectures": ["X"]}), "num_hidden_layers in"),
    ],
)
def test_a_malformed_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^model\.hf_path: ") as caught:
        read_model_shape(tmp_path)
    assert message in str(caught.value)


def test_a_missing_folder_config_or_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which is no folder"):
        read_model_shape(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        read_model_shape(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer in"):
        check_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_tokenizer(tmp_path)
