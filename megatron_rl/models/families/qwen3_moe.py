"""Qwen3-MoE: Qwen3's attention, and experts behind a softmax router; some layers may be dense."""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder, experts
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "Qwen3MoeForCausalLM"

gpt_fields = decoder.gpt_fields


def _has_experts(hf: dict[str, Any], layer: int) -> bool:
    return layer not in (hf.get("mlp_only_layers") or []) and (layer + 1) % hf.get("decoder_sparse_step", 1) == 0


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the options that no Qwen3-MoE uses."""
    decoder.refuse(hf, use_sliding_window=False, attention_bias=False, hidden_act="silu")
    decoder.require(hf, "moe_intermediate_size", 1)
    normalized = bool(hf.get("norm_topk_prob", False))
    routed = dict(
        qk_layernorm=True,
        # The softmax of the chosen logits is the softmax of all, divided by the sum over the chosen.
        moe_router_pre_softmax=not normalized,
        moe_layer_freq=[int(_has_experts(hf, layer)) for layer in range(hf["num_hidden_layers"])],
    )
    return (
        decoder.transformer_fields(hf)
        | experts.transformer_fields(hf, ffn=hf["moe_intermediate_size"], normalized=normalized)
        | routed
    )


def _feed_forward(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    if _has_experts(hf, layer):
        return experts.experts(hf, layer, ffn=hf["moe_intermediate_size"])
    return decoder.gated_mlp(hf, layer)


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return decoder.tensor_maps(hf, attention=partial(decoder.attention, qk_norm=True), feed_forward=_feed_forward)
