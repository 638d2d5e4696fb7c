"""Mixtral: a plain decoder with experts behind a softmax router in every layer."""

from typing import Any

from megatron_rl.models.families import decoder, experts
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "MixtralForCausalLM"

gpt_fields = decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for a sliding window, which no release uses."""
    decoder.refuse(hf, hidden_act="silu")
    if hf.get("sliding_window"):
        decoder.refuse(hf, sliding_window="null")
    return decoder.transformer_fields(hf) | experts.transformer_fields(hf, ffn=hf["intermediate_size"], normalized=True)


def _feed_forward(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    return experts.experts(hf, layer, ffn=hf["intermediate_size"], block="block_sparse_moe", names=("w1", "w3", "w2"))


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return decoder.tensor_maps(hf, feed_forward=_feed_forward)
