"""Nemotron, dense (Nemotron-4, Minitron): LayerNorm with weights around 0, squared ReLU, rotary on a part of a head."""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder

ARCHITECTURE = "NemotronForCausalLM"

tensor_maps = partial(decoder.tensor_maps, feed_forward=decoder.plain_mlp, norm_bias=True)
gpt_fields = decoder.gpt_fields


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the biases that no release has."""
    decoder.refuse(hf, attention_bias=False, mlp_bias=False, hidden_act="relu2")
    return decoder.transformer_fields(hf) | dict(
        normalization="LayerNorm",
        layernorm_epsilon=hf.get("norm_eps", 1e-5),
        layernorm_zero_centered_gamma=True,
        gated_linear_unit=False,
        activation_func="squared_relu",
    )
