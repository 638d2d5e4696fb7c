"""Mistral: a plain decoder whose first release attends to a sliding window of tokens."""

from typing import Any

from megatron_rl.models.families import decoder
from megatron_rl.models.tensor_map import TensorMap

ARCHITECTURE = "MistralForCausalLM"

gpt_fields = decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields."""
    decoder.refuse(hf, hidden_act="silu")
    fields = decoder.transformer_fields(hf)
    if hf.get("sliding_window"):
        fields |= decoder.window_fields(hf, ["sliding_attention"] * hf["num_hidden_layers"])
    return fields


def tensor_maps(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors."""
    return decoder.tensor_maps(hf)
