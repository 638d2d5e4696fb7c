"""`Family`, and what the decoders of Hugging Face share, in parts that a family puts together.

A decoder is an embedding, layers of norm, attention, norm and feed-forward part, a norm, and an output layer that may
be the embedding again. `tensor_maps` walks it; a family passes the parts in which it differs, as functions of
config.json and the layer's number. Here are grouped-query attention, the rotary parameters of a config.json and the
dense feed-forward parts; experts are in `experts`, latent attention is in `deepseek`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.model_config import resolved_config, rotary_source
from megatron_rl.models.tensor_map import TensorMap, gate_up, qkv, replicated, split, vocabulary


@dataclass(frozen=True)
class Family:
    """What differs between architectures; the functions take config.json as a dictionary."""

    architecture: str
    """As config.json names it."""
    transformer_fields: Callable[[dict[str, Any]], dict[str, Any]]
    """Fields of Megatron's TransformerConfig; `activation_func` by the name that `build` gives it. Raises UserError for
    an option that is not supported."""
    gpt_fields: Callable[[dict[str, Any]], dict[str, Any]]
    """Arguments of Megatron's GPTModel."""
    tensor_maps: Callable[[dict[str, Any]], list[TensorMap]]
    """The table of tensors, in the order of the layers."""


PartOfLayer = Callable[[dict[str, Any], int], list[TensorMap]]
"""(config.json, layer) -> the maps of one part of that layer."""


def head_dim(hf: dict[str, Any]) -> int:
    """Channels of one attention head."""
    return int(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])


def num_groups(hf: dict[str, Any]) -> int:
    """Key-value heads."""
    return int(hf.get("num_key_value_heads") or hf["num_attention_heads"])


def refuse(hf: dict[str, Any], **allowed: Any) -> None:
    """Raise UserError for an option that is set to another value than the allowed one (absent or null: not set)."""
    for key, value in allowed.items():
        if hf.get(key) is not None and hf[key] != value:
            given, only = (str(x).lower() if isinstance(x, bool) else x for x in (hf[key], value))
            architecture = hf["architectures"][0]
            raise UserError(f"{key}: {given} in config.json of {architecture} is not supported; allowed: {only}")


def require(hf: dict[str, Any], key: str, low: int, high: int | None = None) -> int:
    """A field that has to be an integer in [low, high].

    Raises:
        UserError: it is missing, or another value.
    """
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        given = "missing" if value is None else value
        raise UserError(f"{key}: {given} in config.json of {hf['architectures'][0]}; allowed: {allowed}")
    return value


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig of a decoder with RMSNorm, grouped-query attention and a gated MLP."""
    heads, groups = hf["num_attention_heads"], num_groups(hf)
    if heads % groups:
        raise UserError(
            f"num_key_value_heads: {groups} in config.json of {hf['architectures'][0]}; allowed: a divisor of the "
            f"{heads} attention heads"
        )
    return dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=num_groups(hf),
        kv_channels=head_dim(hf),
        normalization="RMSNorm",
        layernorm_epsilon=hf.get("rms_norm_eps", 1e-6),
        gated_linear_unit=True,
        add_bias_linear=False,
    )


def gpt_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GPTModel that follow from config.json."""
    rope = rope_parameters(hf)
    return dict(
        max_sequence_length=hf["max_position_embeddings"],
        position_embedding_type="yarn" if rope["rope_type"] == "yarn" else "rope",
        rotary_base=rope["rope_theta"],
        rotary_percent=rope.get("partial_rotary_factor", 1.0),
        share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings", False)),
    )


_ROPE_PARAMETERS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
}
"""rope_type -> what its formula takes."""


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, wherever the version of transformers that wrote config.json put them.

    Raises:
        UserError: a rope_type that has no formula here, or lacks a parameter of its formula; two sources that differ.
    """
    hf = resolved_config(hf)
    rope = rotary_source(hf)
    rope.setdefault("rope_type", "default")
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
        if rope.get("attention_factor") is not None:
            raise UserError(
                f"rope_parameters in config.json: attention_factor {rope['attention_factor']} is not supported; "
                "allowed: absent, it then follows from factor"
            )
    kind = rope["rope_type"]
    if kind not in _ROPE_PARAMETERS:
        raise UserError(f"rope_type '{kind}' in config.json is not supported; allowed: {', '.join(_ROPE_PARAMETERS)}")
    for name in _ROPE_PARAMETERS[kind]:
        if not isinstance(rope.get(name), int | float):
            raise UserError(f"{name} of the rope_type {kind} in config.json: given {rope.get(name)}, allowed: a number")
    return rope


def yarn_concentration(rope: dict[str, Any]) -> tuple[float | None, float | None]:
    """(mscale, mscale_all_dim) with which core multiplies YaRN's cosines and sines as transformers does.

    Both take m(mscale) / m(mscale_all_dim) if both are given, else m(1), with m(x) = 0.1 x ln(factor) + 1.
    Source: YaRN, arXiv:2309.00071, section 3.4; DeepSeek-V2, arXiv:2405.04434, for the quotient.
    """
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return (rope["mscale"], rope["mscale_all_dim"]) if both else (None, None)


def yarn_attributes(rope: dict[str, Any]) -> dict[str, Any]:
    """What core reads from a TransformerConfig for YaRN in ordinary attention; they are no fields of it."""
    mscale, mscale_all_dim = yarn_concentration(rope)
    return dict(
        yarn_rotary_scaling_factor=rope["factor"],
        yarn_original_max_position_embeddings=rope["original_max_position_embeddings"],
        yarn_beta_fast=rope.get("beta_fast") or 32,
        yarn_beta_slow=rope.get("beta_slow") or 1,
        yarn_mscale=mscale,
        yarn_mscale_all_dim=mscale_all_dim,
        yarn_correction_range_round_to_int=rope.get("truncate", True),
    )


def window_fields(hf: dict[str, Any], layer_types: list[str]) -> dict[str, Any]:
    """TransformerConfig fields of attention to the last `sliding_window` tokens, the token itself among them.

    Args:
        hf: config.json.
        layer_types: per layer, sliding_attention or full_attention.

    Raises:
        UserError: not one of these for each layer, or no window.
    """
    allowed = ("sliding_attention", "full_attention")
    if len(layer_types) != hf["num_hidden_layers"] or not set(layer_types) <= set(allowed):
        raise UserError(
            f"layer_types: {len(layer_types)} of {', '.join(sorted(set(layer_types)))} in config.json of "
            f"{hf['architectures'][0]}; allowed: {' or '.join(allowed)} for each of {hf['num_hidden_layers']} layers"
        )
    require(hf, "sliding_window", 1)
    return dict(
        window_size=(hf["sliding_window"] - 1, 0),
        window_attn_skip_freq=[int(kind == "sliding_attention") for kind in layer_types],
    )


def megatron_layer(layer: int) -> str:
    """Prefix of a layer's names in Megatron."""
    return f"decoder.layers.{layer}."


def hf_layer(layer: int) -> str:
    """Prefix of a layer's names in Hugging Face."""
    return f"model.layers.{layer}."


def norm(name: str, hf_name: str, size: int, *, bias: bool = False) -> list[TensorMap]:
    """A norm's weight, and its bias if it has one."""
    return [replicated(f"{name}.{x}", f"{hf_name}.{x}", (size,)) for x in ("weight", *(["bias"] if bias else []))]


def attention(
    hf: dict[str, Any], layer: int, *, qkv_bias: bool = False, output_bias: bool = False, qk_norm: bool = False
) -> list[TensorMap]:
    """Grouped-query attention."""
    prefix, hf_prefix = f"{megatron_layer(layer)}self_attention.", f"{hf_layer(layer)}self_attn."
    hidden, heads, channels = hf["hidden_size"], hf["num_attention_heads"], head_dim(hf)
    q, k, v = (f"{hf_prefix}{part}_proj." for part in "qkv")
    shape: dict[str, Any] = dict(num_heads=heads, num_groups=num_groups(hf), head_dim=channels)
    maps = [qkv(f"{prefix}linear_qkv.weight", f"{q}weight", f"{k}weight", f"{v}weight", columns=(hidden,), **shape)]
    if qkv_bias:
        maps.append(qkv(f"{prefix}linear_qkv.bias", f"{q}bias", f"{k}bias", f"{v}bias", columns=(), **shape))
    if qk_norm:
        for x in "qk":
            maps += norm(f"{prefix}{x}_layernorm", f"{hf_prefix}{x}_norm", channels)
    maps.append(split(f"{prefix}linear_proj.weight", f"{hf_prefix}o_proj.weight", (hidden, heads * channels), dim=1))
    if output_bias:
        maps.append(replicated(f"{prefix}linear_proj.bias", f"{hf_prefix}o_proj.bias", (hidden,)))
    return maps


def gated(
    prefix: str,
    hf_prefix: str,
    hidden: int,
    ffn: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[TensorMap]:
    """A gated MLP under two prefixes."""
    gate, up, down = (f"{hf_prefix}{name}.weight" for name in names)
    return [
        gate_up(f"{prefix}linear_fc1.weight", gate, up, (ffn, hidden)),
        split(f"{prefix}linear_fc2.weight", down, (hidden, ffn), dim=1),
    ]


def gated_mlp(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    """The dense feed-forward part of most families."""
    return gated(f"{megatron_layer(layer)}mlp.", f"{hf_layer(layer)}mlp.", hf["hidden_size"], hf["intermediate_size"])


def plain_mlp(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    """A feed-forward part without a gate."""
    prefix, hf_prefix, hidden, ffn = (
        f"{megatron_layer(layer)}mlp.",
        f"{hf_layer(layer)}mlp.",
        hf["hidden_size"],
        hf["intermediate_size"],
    )
    return [
        split(f"{prefix}linear_fc1.weight", f"{hf_prefix}up_proj.weight", (ffn, hidden), dim=0),
        split(f"{prefix}linear_fc2.weight", f"{hf_prefix}down_proj.weight", (hidden, ffn), dim=1),
    ]


def tensor_maps(
    hf: dict[str, Any],
    *,
    attention: PartOfLayer = attention,
    feed_forward: PartOfLayer = gated_mlp,
    norm_bias: bool = False,
) -> list[TensorMap]:
    """The table of a decoder, in the order of the layers."""
    hidden = hf["hidden_size"]
    normed = partial(norm, size=hidden, bias=norm_bias)
    maps = [vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", (hf["vocab_size"], hidden))]
    for layer in range(hf["num_hidden_layers"]):
        maps += normed(f"{megatron_layer(layer)}input_layernorm", f"{hf_layer(layer)}input_layernorm")
        maps += attention(hf, layer)
        maps += normed(f"{megatron_layer(layer)}pre_mlp_layernorm", f"{hf_layer(layer)}post_attention_layernorm")
        maps += feed_forward(hf, layer)
    maps += normed("decoder.final_layernorm", "model.norm")
    if not hf.get("tie_word_embeddings", False):
        maps.append(vocabulary("output_layer.weight", "lm_head.weight", (hf["vocab_size"], hidden)))
    return maps
