"""Llama 3.x: a plain dense decoder; from 3.1 on with scaled rotary frequencies (see models/rotary.py)."""

from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import dense_decoder
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "LlamaForCausalLM"

gpt_fields = dense_decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the biases that no Llama 3 has."""
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise UserError(f"{key}: true in config.json of {ARCHITECTURE} is not supported; allowed: false")
    return dense_decoder.transformer_fields(hf)


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return dense_decoder.tensor_maps(hf)
