"""GPT-OSS: biases everywhere, attention sinks, every other layer on a sliding window, stacked experts.

A sink is a logit per head that takes part in the softmax of the attention and stands for no token. The experts of a
layer are stacked in one tensor each, transposed, with rows of gate and up taking turns. Source: the model card of
GPT-OSS, arXiv:2508.10925.
"""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder, experts
from megatron_rl.models.families.decoder import Family, hf_layer, megatron_layer
from megatron_rl.models.tensor_map import TensorMap, alternating_gate_up, of_expert, replicated, split, stacked


def _transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for layers of another kind, and for another activation."""
    decoder.refuse(hf, attention_bias=True, swiglu_alpha=1.702, hidden_act="silu")
    kinds = ("sliding_attention", "full_attention")
    layer_types = hf.get("layer_types") or [kinds[layer % 2] for layer in range(hf["num_hidden_layers"])]
    return (
        decoder.transformer_fields(hf)
        | experts.transformer_fields(hf, ffn=hf["intermediate_size"], normalized=True)
        | decoder.window_fields(hf, layer_types)
        | dict(
            add_bias_linear=True,
            softmax_type="learnable",
            activation_func="quick_gelu",
            glu_linear_offset=1.0,
            activation_func_clamp_value=hf.get("swiglu_limit", 7.0),
        )
    )


def _attention(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    sinks = split(
        f"{megatron_layer(layer)}self_attention.core_attention.softmax_offset",
        f"{hf_layer(layer)}self_attn.sinks",
        (hf["num_attention_heads"],),
        dim=0,
    )
    return [*decoder.attention(hf, layer, qkv_bias=True, output_bias=True), sinks]


def _feed_forward(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    hidden, ffn, count = hf["hidden_size"], hf["intermediate_size"], experts.num_experts(hf)
    router, hf_router = f"{megatron_layer(layer)}mlp.router.", f"{hf_layer(layer)}mlp.router."
    maps = [
        replicated(f"{router}weight", f"{hf_router}weight", (count, hidden)),
        replicated(f"{router}bias", f"{hf_router}bias", (count,)),
    ]
    of_layer = f"{hf_layer(layer)}mlp.experts."
    parts = {
        ("linear_fc1.weight", True): partial(
            alternating_gate_up, hf_name=f"{of_layer}gate_up_proj", shape=(2 * ffn, hidden)
        ),
        ("linear_fc1.bias", False): partial(
            alternating_gate_up, hf_name=f"{of_layer}gate_up_proj_bias", shape=(2 * ffn,)
        ),
        ("linear_fc2.weight", True): partial(split, hf_name=f"{of_layer}down_proj", shape=(hidden, ffn), dim=1),
        ("linear_fc2.bias", False): partial(replicated, hf_name=f"{of_layer}down_proj_bias", shape=(hidden,)),
    }
    for (name, transposed), part in parts.items():
        of_experts = [
            of_expert(part(f"{experts.expert_prefix(layer, expert)}{name}"), expert, count) for expert in range(count)
        ]
        maps += stacked(of_experts, transposed=transposed)
    return maps


FAMILIES = (
    Family(
        "GptOssForCausalLM",
        _transformer_fields,
        decoder.gpt_fields,
        partial(decoder.tensor_maps, attention=_attention, feed_forward=_feed_forward),
    ),
)
