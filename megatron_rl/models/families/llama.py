"""Llama 2 and 3.x: a plain decoder; from 3.1 on with scaled rotary frequencies (see models/build.py)."""

from typing import Any

from megatron_rl.models.families import decoder
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "LlamaForCausalLM"

gpt_fields = decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the biases that no Llama has."""
    decoder.refuse(hf, attention_bias=False, mlp_bias=False, hidden_act="silu")
    return decoder.transformer_fields(hf)


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return decoder.tensor_maps(hf)
