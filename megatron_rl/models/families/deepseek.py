"""DeepSeek-V2, V2-Lite, V3, R1 and Moonlight: latent attention, dense layers first, then routed and shared experts.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values of all heads come from one
latent vector of `kv_lora_rank` channels, queries from one of `q_lora_rank` or straight from the hidden state; queries
and keys have a part with and a part without rotary embedding. Every tensor-parallel rank holds the projections down to
the latents whole.

V2's router takes a softmax, whose scores are not renormalised. V3's takes a sigmoid, with a bias per expert that only
counts when it chooses: a float32 buffer, which training leaves as it is (`moe_router_bias_update_rate` 0) unless asked
otherwise. V3's layers that predict further tokens (`num_nextn_predict_layers`) are no part of the policy: they are
neither read nor written.
"""

from functools import partial
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import decoder, experts
from megatron_rl.models.families.decoder import (
    Family,
    hf_layer,
    megatron_layer,
    norm,
    rope_parameters,
    yarn_concentration,
)
from megatron_rl.models.tensor_map import TensorMap, replicated, split


def _v2(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for a router that core does not have."""
    method = hf.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        decoder.refuse(hf, topk_method="greedy")
    decoder.refuse(hf, norm_topk_prob=False, scoring_func="softmax")
    # A group's score is its best expert's.
    fields = _transformer_fields(hf, grouped=method == "group_limited_greedy", group_scores=1, normalized=False)
    return fields | dict(moe_router_pre_softmax=True)


def _v3(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for a router that core does not have."""
    decoder.refuse(hf, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True)
    # A group's score is the sum of its two best experts'.
    fields = _transformer_fields(hf, grouped=(hf.get("n_group") or 1) > 1, group_scores=2, normalized=True)
    return fields | dict(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.0
    )


def _transformer_fields(hf: dict[str, Any], *, grouped: bool, group_scores: int, normalized: bool) -> dict[str, Any]:
    """TransformerConfig fields.

    Args:
        hf: config.json.
        grouped: whether the router first chooses groups of experts.
        group_scores: number of a group's best scores that the family adds up to choose groups. Core adds up
            num_experts_per_tok / topk_group of them.
        normalized: see `experts.transformer_fields`.

    Raises:
        UserError: an option that core's router does not have.
    """
    decoder.refuse(hf, moe_layer_freq=1, mlp_bias=False, hidden_act="silu")
    for key in ("moe_intermediate_size", "n_shared_experts", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
        decoder.require(hf, key, 1)
    if grouped:
        _check_groups(hf, group_scores)
    dense = decoder.require({"first_k_dense_replace": 0, **hf}, "first_k_dense_replace", 0, hf["num_hidden_layers"])
    routed = dict(
        moe_layer_freq=[int(layer >= dense) for layer in range(hf["num_hidden_layers"])],
        moe_shared_expert_intermediate_size=hf["moe_intermediate_size"] * hf["n_shared_experts"],
        moe_router_num_groups=hf["n_group"] if grouped else None,
        moe_router_group_topk=hf["topk_group"] if grouped else None,
        moe_router_topk_scaling_factor=hf.get("routed_scaling_factor", 1.0),
        moe_router_dtype="fp32",
    )
    return (
        decoder.transformer_fields(hf)
        | _latent_fields(hf)
        | experts.transformer_fields(hf, ffn=hf["moe_intermediate_size"], normalized=normalized)
        | routed
    )


def _latent_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Megatron's MLATransformerConfig that are not those of any decoder.

    Raises:
        UserError: a rotary scaling that core's latent attention does not express.
    """
    decoder.refuse(hf, attention_bias=False)
    rope = rope_parameters(hf)
    fields = dict(
        multi_latent_attention=True,
        qk_layernorm=True,
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        kv_channels=hf["v_head_dim"],
        num_query_groups=hf["num_attention_heads"],
        rope_type="rope",
        rotary_base=rope["rope_theta"],
        rotary_scaling_factor=1.0,
    )
    if rope["rope_type"] != "yarn":
        return fields
    mscale, mscale_all_dim = yarn_concentration(rope)
    if rope.get("truncate") is False or (rope.get("mscale_all_dim") and not rope.get("mscale")):
        raise UserError(
            "rope_parameters in config.json: yarn with truncate: false, or with mscale_all_dim and no mscale, is not "
            "supported for latent attention; allowed: truncate: true, mscale and mscale_all_dim or neither"
        )
    return fields | dict(
        rope_type="yarn",
        rotary_scaling_factor=rope["factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        mscale=1.0 if mscale is None else mscale,
        mscale_all_dim=0.0 if mscale_all_dim is None else mscale_all_dim,
    )


def _check_groups(hf: dict[str, Any], group_scores: int) -> None:
    groups = decoder.require(hf, "n_group", 1, experts.num_experts(hf))
    decoder.require(hf, "topk_group", 1, groups)
    if experts.num_experts(hf) % groups:
        raise UserError(
            f"n_group: {groups} in config.json of {hf['architectures'][0]}; allowed: a divisor of the "
            f"{experts.num_experts(hf)} experts"
        )
    if hf["num_experts_per_tok"] // hf["topk_group"] != group_scores:
        allowed = group_scores * hf["topk_group"]
        raise UserError(
            f"num_experts_per_tok: {hf['num_experts_per_tok']} in config.json of {hf['architectures'][0]} with "
            f"topk_group {hf['topk_group']} is not supported; allowed: {allowed}, as Megatron chooses groups"
        )


def _gpt_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GPTModel. Its own rotary embedding is not used: latent attention has one in every layer."""
    return decoder.gpt_fields(hf) | dict(position_embedding_type="rope", rotary_percent=1.0)


def _tensor_maps(hf: dict[str, Any], *, expert_bias: bool) -> list[TensorMap]:
    """The table of tensors; `expert_bias`: the router adds a bias to each expert's score when it chooses."""

    def feed_forward(hf: dict[str, Any], layer: int) -> list[TensorMap]:
        if layer < hf.get("first_k_dense_replace", 0):
            return decoder.gated_mlp(hf, layer)
        maps = experts.experts(hf, layer, ffn=hf["moe_intermediate_size"])
        if expert_bias:
            name, hf_name = f"{megatron_layer(layer)}mlp.router.", f"{hf_layer(layer)}mlp.gate."
            bias = replicated(
                f"{name}expert_bias", f"{hf_name}e_score_correction_bias", (experts.num_experts(hf),), float32=True
            )
            maps.insert(1, bias)
        return maps + experts.shared_experts(hf, layer, ffn=hf["moe_intermediate_size"] * hf["n_shared_experts"])

    return decoder.tensor_maps(hf, attention=_latent_attention, feed_forward=feed_forward)


def _latent_attention(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    """The latent attention of one layer. Rows of the up projections go head by head, as in Megatron."""
    prefix, hf_prefix = f"{megatron_layer(layer)}self_attention.", f"{hf_layer(layer)}self_attn."
    hidden, heads, nope, rope = (
        hf[key] for key in ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    q_rank, kv_rank, value = hf.get("q_lora_rank"), hf["kv_lora_rank"], hf["v_head_dim"]
    queries = heads * (nope + rope)
    if q_rank is None:
        maps = [split(f"{prefix}linear_q_proj.weight", f"{hf_prefix}q_proj.weight", (queries, hidden), dim=0)]
    else:
        maps = [
            replicated(f"{prefix}linear_q_down_proj.weight", f"{hf_prefix}q_a_proj.weight", (q_rank, hidden)),
            *norm(f"{prefix}q_layernorm", f"{hf_prefix}q_a_layernorm", q_rank),
            split(f"{prefix}linear_q_up_proj.weight", f"{hf_prefix}q_b_proj.weight", (queries, q_rank), dim=0),
        ]
    down, up, out = (f"{hf_prefix}{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
    return [
        *maps,
        replicated(f"{prefix}linear_kv_down_proj.weight", down, (kv_rank + rope, hidden)),
        *norm(f"{prefix}kv_layernorm", f"{hf_prefix}kv_a_layernorm", kv_rank),
        split(f"{prefix}linear_kv_up_proj.weight", up, (heads * (nope + value), kv_rank), dim=0),
        split(f"{prefix}linear_proj.weight", out, (hidden, heads * value), dim=1),
    ]


FAMILIES = (
    Family("DeepseekV2ForCausalLM", _v2, _gpt_fields, partial(_tensor_maps, expert_bias=False)),
    Family("DeepseekV3ForCausalLM", _v3, _gpt_fields, partial(_tensor_maps, expert_bias=True)),
)
