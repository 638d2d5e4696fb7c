"""What each family says of its config.json: the fields, the table, and the options that are refused."""

import json

import pytest
import torch
from safetensors import safe_open

from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import SUPPORTED_ARCHITECTURES
from megatron_rl.models.families import FAMILIES, family_of
from tests import checkpoints

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 6, "num_key_value_heads": 2}


def test_an_unknown_architecture_names_the_known_ones():
    message = "'GPT2LMHeadModel' .* allowed: DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, GptOssForCausalLM, Llama"
    with pytest.raises(UserError, match=message):
        family_of({"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(UserError, match="'none'"):
        family_of({"architectures": None})


def test_the_configuration_allows_the_architectures_that_have_a_family():
    assert sorted(SUPPORTED_ARCHITECTURES) == sorted(FAMILIES)


@pytest.mark.parametrize(
    ("hf", "key"),
    [
        (LLAMA, "attention_bias"),
        (LLAMA, "mlp_bias"),
        (QWEN2, "use_sliding_window"),
        (QWEN3, "use_sliding_window"),
        (QWEN3, "attention_bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["architectures"][0],
)
def test_an_unsupported_option_is_refused_by_name(hf, key):
    with pytest.raises(UserError, match=f"{key}: true in config.json of {hf['architectures'][0]} is not supported"):
        family_of(hf).transformer_fields({**hf, key: True})
    family_of(hf).transformer_fields({**hf, key: False})


def test_fields():
    # Where config.json is silent, heads have hidden_size / heads channels, and each its own keys and values.
    llama = family_of(LLAMA).transformer_fields(LLAMA)
    assert (llama["kv_channels"], llama["num_query_groups"], llama["layernorm_epsilon"]) == (2, 4, 1e-5)
    assert not llama.get("add_qkv_bias")
    assert not llama.get("qk_layernorm")
    qwen3 = family_of(QWEN3).transformer_fields(QWEN3)
    assert (qwen3["kv_channels"], qwen3["num_query_groups"], qwen3["qk_layernorm"]) == (6, 2, True)
    assert family_of(QWEN2).transformer_fields(QWEN2)["add_qkv_bias"] is True
    assert family_of(LLAMA).gpt_fields({**LLAMA, "tie_word_embeddings": True})["share_embeddings_and_output_weights"]


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_the_table_is_exactly_what_transformers_writes(tmp_path, family):
    folder = checkpoints.make_checkpoint(tmp_path, family, seed=1)
    hf = json.loads((folder / "config.json").read_text())
    maps = family_of(hf).tensor_maps(hf)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    named = [(name, shape) for tensor_map in maps for name, shape in tensor_map.hf_shapes.items()]
    assert dict(named) == written
    whole = [m for m in maps if m.index is None]
    assert len({name for m in whole for name in m.hf_shapes}) == sum(len(m.hf_shapes) for m in whole)  # no tensor twice
    names = [tensor_map.name for tensor_map in maps]
    assert len(set(names)) == len(names)
    numel = sum(torch.Size(tensor_map.shard_shape(0, 1)).numel() for tensor_map in maps)
    assert numel == sum(torch.Size(shape).numel() for shape in written.values())
