"""Qwen3, dense: RMSNorm over each head of queries and keys, no biases."""

from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import dense_decoder
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "Qwen3ForCausalLM"

gpt_fields = dense_decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the options that no dense Qwen3 uses."""
    for key in ("use_sliding_window", "attention_bias"):
        if hf.get(key):
            raise UserError(f"{key}: true in config.json of {ARCHITECTURE} is not supported; allowed: false")
    return dense_decoder.transformer_fields(hf) | dict(qk_layernorm=True)


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return dense_decoder.tensor_maps(hf, qk_norm=True)
