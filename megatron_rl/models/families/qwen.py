"""Qwen2 and 2.5 (dense), Qwen3 (dense) and Qwen3-MoE.

Qwen2 has a bias on the attention's input projection. Qwen3 has none, and RMSNorm over each head of queries and keys;
Qwen3-MoE adds experts behind a softmax router, and some of its layers may be dense.
"""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder, experts
from megatron_rl.models.families.decoder import Family
from megatron_rl.models.tensor_map import TensorMap


def _qwen2(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for sliding windows, which the dense releases leave off."""
    decoder.refuse(hf, use_sliding_window=False, hidden_act="silu")
    return decoder.transformer_fields(hf) | dict(add_qkv_bias=True)


def _qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the options that no Qwen3 uses."""
    decoder.refuse(hf, use_sliding_window=False, attention_bias=False, hidden_act="silu")
    return decoder.transformer_fields(hf) | dict(qk_layernorm=True)


def _qwen3_moe(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the options that no Qwen3-MoE uses."""
    fields = _qwen3(hf)
    decoder.require(hf, "moe_intermediate_size", 1)
    normalized = bool(hf.get("norm_topk_prob", False))
    routed = dict(
        # The softmax of the chosen logits is the softmax of all, divided by the sum over the chosen.
        moe_router_pre_softmax=not normalized,
        moe_layer_freq=[int(_has_experts(hf, layer)) for layer in range(hf["num_hidden_layers"])],
    )
    return fields | experts.transformer_fields(hf, ffn=hf["moe_intermediate_size"], normalized=normalized) | routed


def _has_experts(hf: dict[str, Any], layer: int) -> bool:
    return layer not in (hf.get("mlp_only_layers") or []) and (layer + 1) % hf.get("decoder_sparse_step", 1) == 0


def _experts_or_mlp(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    if _has_experts(hf, layer):
        return experts.experts(hf, layer, ffn=hf["moe_intermediate_size"])
    return decoder.gated_mlp(hf, layer)


_with_bias = partial(decoder.attention, qkv_bias=True)
_with_norms = partial(decoder.attention, qk_norm=True)

FAMILIES = (
    Family("Qwen2ForCausalLM", _qwen2, decoder.gpt_fields, partial(decoder.tensor_maps, attention=_with_bias)),
    Family("Qwen3ForCausalLM", _qwen3, decoder.gpt_fields, partial(decoder.tensor_maps, attention=_with_norms)),
    Family(
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        decoder.gpt_fields,
        partial(decoder.tensor_maps, attention=_with_norms, feed_forward=_experts_or_mlp),
    ),
)
