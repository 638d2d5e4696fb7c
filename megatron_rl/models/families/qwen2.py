"""Qwen2 and Qwen2.5, dense: a bias on the attention input projection."""

from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import dense_decoder
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "Qwen2ForCausalLM"

gpt_fields = dense_decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for sliding windows, which the dense releases leave off."""
    if hf.get("use_sliding_window"):
        raise UserError(f"use_sliding_window: true in config.json of {ARCHITECTURE} is not supported; allowed: false")
    return dense_decoder.transformer_fields(hf) | dict(add_qkv_bias=True)


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return dense_decoder.tensor_maps(hf, qkv_bias=True)
