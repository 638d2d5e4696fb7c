"""Qwen2 and Qwen2.5, dense: a bias on the attention input projection."""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "Qwen2ForCausalLM"

gpt_fields = decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for sliding windows, which the dense releases leave off."""
    decoder.refuse(hf, use_sliding_window=False, hidden_act="silu")
    return decoder.transformer_fields(hf) | dict(add_qkv_bias=True)


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return decoder.tensor_maps(hf, attention=partial(decoder.attention, qkv_bias=True))
