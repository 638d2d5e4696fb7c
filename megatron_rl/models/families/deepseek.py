"""What DeepSeek-V2 and V3 share: latent attention, dense layers first, then routed and shared experts."""

from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import decoder, experts, latent_attention
from megatron_rl.models.tensor_map import TensorMap, replicated


def gpt_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GPTModel. Its own rotary embedding is not used: latent attention has one in every layer."""
    return decoder.gpt_fields(hf) | dict(position_embedding_type="rope", rotary_percent=1.0)


def transformer_fields(hf: dict[str, Any], *, grouped: bool, group_scores: int, normalized: bool) -> dict[str, Any]:
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
        | latent_attention.transformer_fields(hf)
        | experts.transformer_fields(hf, ffn=hf["moe_intermediate_size"], normalized=normalized)
        | routed
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


def tensor_maps(hf: dict[str, Any], *, expert_bias: bool) -> list[TensorMap]:
    """The table of tensors; `expert_bias`: the router adds a bias to each expert's score when it chooses."""

    def feed_forward(hf: dict[str, Any], layer: int) -> list[TensorMap]:
        if layer < hf.get("first_k_dense_replace", 0):
            return decoder.gated_mlp(hf, layer)
        maps = experts.experts(hf, layer, ffn=hf["moe_intermediate_size"])
        if expert_bias:
            name, hf_name = f"{decoder.ours(layer)}mlp.router.", f"{decoder.theirs(layer)}mlp.gate."
            bias = replicated(
                f"{name}expert_bias", f"{hf_name}e_score_correction_bias", (experts.num_experts(hf),), float32=True
            )
            maps.insert(1, bias)
        return maps + experts.shared_experts(hf, layer, ffn=hf["moe_intermediate_size"] * hf["n_shared_experts"])

    return decoder.tensor_maps(hf, attention=latent_attention.attention, feed_forward=feed_forward)
