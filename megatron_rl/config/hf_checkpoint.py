"""What a Hugging Face checkpoint folder promises, read without torch: config.json, tokenizer, headers of the weights.

A safetensors file is 8 bytes of little-endian header length, a JSON header of tensor names, dtypes, shapes and byte
ranges, and the bytes. The header alone tells whether a file is complete, so a checkpoint of any size is checked in
milliseconds and no weight is read. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import ConfigError

SUPPORTED_ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "NemotronForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What config.json calls the number of routed experts: Qwen3-MoE, Mixtral and GPT-OSS, DeepSeek."""
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_OTHER_FILES = ("._", "adapter_", "consolidated.", "consolidated-")
"""Beginnings of safetensors files that hold no weights of the model, or the same ones again."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a layout must divide and a sequence must fit."""

    architecture: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    """Tokens of the longest sequence."""
    num_experts: int = 0
    """Routed experts of an MoE layer; 0 for a dense model."""
    expert_intermediate_size: int = 0
    """Channels of one of them; 0 for a dense model."""


def read_model_shape(folder: Path, key: str = "model.hf_path") -> ModelShape:
    """Sizes from the folder's config.json; `key` is named in errors.

    Raises:
        ConfigError: no folder, no config.json, malformed JSON, a size that is missing or no positive integer.
    """
    if not folder.is_dir():
        raise ConfigError(f"{key}: given '{folder}', which is no folder; allowed: a Hugging Face checkpoint folder")
    config = read_json_object(folder / "config.json", key)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(f"{key}: architectures in {folder / 'config.json'} must name one; given {architectures}")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    sizes = {}
    for name in list(ModelShape.__dataclass_fields__)[1:-2]:
        size = config.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{key}: {name} in {folder / 'config.json'}: given {size}, allowed: an integer >= 1")
        sizes[name] = size
    num_experts = next((config[name] for name in NUM_EXPERTS if config.get(name)), 0)
    ffn = config.get("moe_intermediate_size") or sizes["intermediate_size"]
    experts = dict(num_experts=num_experts, expert_intermediate_size=ffn) if num_experts else {}
    return ModelShape(architecture=str(architectures[0]), **sizes, **experts)


def check_tokenizer(folder: Path, key: str = "model.hf_path") -> None:
    """Raise ConfigError if the folder has no tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{key}: no tokenizer in '{folder}'; needed: one of {', '.join(_TOKENIZER_FILES)}")


def check_weights(folder: Path, key: str = "model.hf_path") -> None:
    """Raise ConfigError unless the folder's safetensors files are all there and complete."""
    tensors_of = files_of_weights(folder, key)
    if not tensors_of:
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        found = f"only pickled weights such as {pickles[0]}, never read," if pickles else "no weights"
        raise ConfigError(f"{key}: {found} in '{folder}'; needed: *.safetensors, or model.load_weights=false")
    file_of: dict[str, str] = {}
    for name, expected in tensors_of.items():
        held = _complete_tensors(folder / name, key)
        if missing := sorted(expected - held):
            raise ConfigError(f"{key}: {folder / name}: tensor '{missing[0]}' is missing, which {_INDEX} promises")
        if twice := sorted(held & file_of.keys()):
            raise ConfigError(
                f"{key}: tensor '{twice[0]}' is in {folder / file_of[twice[0]]} and in {folder / name}; "
                "allowed: one file for each tensor"
            )
        file_of |= dict.fromkeys(held, name)


def files_of_weights(folder: Path, key: str = "model.hf_path") -> dict[str, set[str]]:
    """The files that hold a folder's weights, by name, each with the tensors that an index promises in it.

    With an index they are its files; without, all of *.safetensors. Left out by name are adapters, what macOS puts
    beside a file, and the consolidated copy of Mistral's releases, as transformers and vLLM leave them out.

    Raises:
        ConfigError: a malformed index; model.safetensors beside an index that does not name it: transformers reads
            the one, vLLM the other.
    """
    index = folder / _INDEX
    found = sorted(file.name for file in folder.glob("*.safetensors") if not file.name.startswith(_OTHER_FILES))
    if not index.is_file():
        return {name: set() for name in found}
    tensors_of = _read_index(index, key)
    if "model.safetensors" in found and "model.safetensors" not in tensors_of:
        raise ConfigError(
            f"{key}: given '{folder}' with both model.safetensors and {_INDEX}, which names other files; "
            "allowed: one of them"
        )
    return tensors_of


def _read_index(index: Path, key: str) -> dict[str, set[str]]:
    """The tensors of each file."""
    weight_map = read_json_object(index, key).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{key}: {index}: weight_map must map tensors to files")
    tensors_of: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if Path(name).name != name:
            raise ConfigError(f"{key}: {index}: given file '{name}', allowed: a file of the same folder")
        tensors_of.setdefault(name, set()).add(tensor)
    return tensors_of


def _complete_tensors(file: Path, key: str) -> set[str]:
    """Names of the tensors of a safetensors file.

    Raises:
        ConfigError: missing, empty, truncated, longer than its header says, or not a safetensors file.
    """
    if not file.is_file():
        raise ConfigError(f"{key}: {file} does not exist")
    size = file.stat().st_size
    if size == 0:
        raise ConfigError(f"{key}: {file} is empty")
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else math.inf
        if 8 + header_size > size:
            raise ConfigError(f"{key}: {file} is truncated or no safetensors file: {size} bytes end in its header")
        try:
            header = json.loads(stream.read(int(header_size)))
            header.pop("__metadata__", None)
            end = 8 + header_size + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(f"{key}: {file} is no safetensors file: its header is malformed") from error
    if end != size:
        kind = "truncated" if size < end else "damaged"
        raise ConfigError(f"{key}: {file} is {kind}: {size} bytes, but its header says {end}")
    return set(header)


def read_json_object(file: Path, key: str) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"{key}: {file} does not exist")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{key}: {file} is malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: {file}: given {type(value).__name__}, allowed: a JSON object")
    return value
