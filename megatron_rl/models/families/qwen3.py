"""Qwen3, dense: RMSNorm over each head of queries and keys, no biases."""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "Qwen3ForCausalLM"

gpt_fields = decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the options that no dense Qwen3 uses."""
    decoder.refuse(hf, use_sliding_window=False, attention_bias=False, hidden_act="silu")
    return decoder.transformer_fields(hf) | dict(qk_layernorm=True)


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return decoder.tensor_maps(hf, attention=partial(decoder.attention, qk_norm=True))
