"""What each family says of its config.json: the fields, the table, and the options that are refused."""

import json

import pytest
import torch
from safetensors import safe_open

from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import SUPPORTED_ARCHITECTURES
from megatron_rl.models.families import FAMILIES, check_family, family_of
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
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4}
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


SHAPE = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
    "head_dim": 16,
    "num_key_value_heads": 2,
}
MIXTRAL = {
    **SHAPE,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = {**MIXTRAL, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "moe_intermediate_size": 16}
GPT_OSS = {**MIXTRAL, "architectures": ["GptOssForCausalLM"], "sliding_window": 8, "rope_theta": 150000.0}
DEEPSEEK_V3 = {
    **SHAPE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
DEEPSEEK_V2 = {**DEEPSEEK_V3, "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "greedy"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        (
            MIXTRAL,
            {"num_local_experts": None},
            "num_experts: missing in config.json of MixtralForCausalLM; allowed: an",
        ),
        (MIXTRAL, {"num_local_experts": 0}, "num_local_experts: 0 in .* allowed: an integer >= 1"),
        (MIXTRAL, {"num_experts_per_tok": 5}, r"num_experts_per_tok: 5 in .* allowed: an integer in \[2, 4\]"),
        (MIXTRAL, {"num_experts_per_tok": 1}, r"num_experts_per_tok: 1 in .* allowed: an integer in \[2, 4\]"),
        (MIXTRAL, {"num_experts_per_tok": None}, "num_experts_per_tok: missing in config.json of Mixtral"),
        (
            MIXTRAL,
            {"num_key_value_heads": 3},
            "num_key_value_heads: 3 in .* allowed: a divisor of the 4 attention heads",
        ),
        (MIXTRAL, {"sliding_window": 64}, "sliding_window: 64 in .* not supported; allowed: null"),
        (QWEN3_MOE, {"moe_intermediate_size": None}, "moe_intermediate_size: missing in config.json of Qwen3Moe"),
        (QWEN3_MOE, {"use_sliding_window": True}, "use_sliding_window: true in .* not supported"),
        (GPT_OSS, {"layer_types": ["full_attention"]}, "layer_types: 1 of full_attention in .* each of 2 layers"),
        (
            GPT_OSS,
            {"layer_types": ["chunked_attention"] * 2},
            "layer_types: 2 of chunked_attention in .* allowed: sliding",
        ),
        (GPT_OSS, {"sliding_window": None}, "sliding_window: missing in config.json of GptOss"),
        (GPT_OSS, {"attention_bias": False}, "attention_bias: false in .* not supported; allowed: true"),
        (GPT_OSS, {"swiglu_alpha": 2.0}, "swiglu_alpha: 2.0 in .* allowed: 1.702"),
        (GPT_OSS, {"rope_scaling": {**YARN, "attention_factor": 1.2}}, "attention_factor 1.2 is not supported"),
        (GPT_OSS, {"rope_scaling": {"rope_type": "yarn"}}, "factor of the rope_type yarn .* given None"),
        (
            DEEPSEEK_V3 | {"n_group": 1},
            {"num_experts_per_tok": 1},
            r"num_experts_per_tok: 1 in .* allowed: an integer in \[2, 8\]",
        ),
        (DEEPSEEK_V3, {"n_group": 3}, "n_group: 3 in .* allowed: a divisor of the 8 experts"),
        (DEEPSEEK_V3, {"topk_group": 5}, r"topk_group: 5 in .* allowed: an integer in \[1, 4\]"),
        (DEEPSEEK_V3, {"topk_group": 1}, "num_experts_per_tok: 4 in .* topk_group 1 is not supported; allowed: 2"),
        (DEEPSEEK_V3, {"first_k_dense_replace": 3}, r"first_k_dense_replace: 3 in .* allowed: an integer in \[0, 2\]"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq: 2 in .* allowed: 1"),
        (DEEPSEEK_V3, {"n_shared_experts": None}, "n_shared_experts: missing in config.json of DeepseekV3"),
        (DEEPSEEK_V3, {"kv_lora_rank": None}, "kv_lora_rank: missing in config.json of DeepseekV3"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func: softmax in .* allowed: sigmoid"),
        (DEEPSEEK_V3, {"norm_topk_prob": False}, "norm_topk_prob: false in .* allowed: true"),
        (DEEPSEEK_V3, {"rope_scaling": {**YARN, "truncate": False}}, "yarn with truncate: false"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method: noaux_tc in .* allowed: greedy"),
        (DEEPSEEK_V2, {"topk_method": "group_limited_greedy"}, "num_experts_per_tok: 4 .* topk_group 2 .* allowed: 2"),
        (DEEPSEEK_V2, {"v_head_dim": ...}, "v_head_dim is missing in config.json of DeepseekV2ForCausalLM"),
    ],
    ids=lambda value: str(value.get("architectures", [next(iter(value))])[0]) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_one_line(hf, change, message):
    check_family(hf)
    changed = {key: value for key, value in (hf | change).items() if value is not ...}
    with pytest.raises(UserError, match=message) as caught:
        check_family(changed)
    assert "\n" not in str(caught.value)


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
