"""Llama and its relatives: Llama 2 and 3.x, Mistral, Mixtral, Nemotron (dense: Nemotron-4, Minitron).

Llama is the plain decoder; from 3.1 on its rotary frequencies are scaled (see models/build.py). Mistral's first release
attends to a sliding window, Mixtral has experts behind a softmax router in every layer, Nemotron has LayerNorm with
weights around 0, squared ReLU and rotary embedding on a part of a head.
"""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder, experts
from megatron_rl.models.families.decoder import Family
from megatron_rl.models.tensor_map import TensorMap


def _llama(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the biases that no Llama has."""
    decoder.refuse(hf, attention_bias=False, mlp_bias=False, hidden_act="silu")
    return decoder.transformer_fields(hf)


def _mistral(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields."""
    decoder.refuse(hf, hidden_act="silu")
    fields = decoder.transformer_fields(hf)
    if hf.get("sliding_window"):
        fields |= decoder.window_fields(hf, ["sliding_attention"] * hf["num_hidden_layers"])
    return fields


def _mixtral(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for a sliding window, which no release uses."""
    decoder.refuse(hf, hidden_act="silu")
    if hf.get("sliding_window"):
        decoder.refuse(hf, sliding_window="null")
    return decoder.transformer_fields(hf) | experts.transformer_fields(hf, ffn=hf["intermediate_size"], normalized=True)


def _mixtral_experts(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    return experts.experts(hf, layer, ffn=hf["intermediate_size"], block="block_sparse_moe", names=("w1", "w3", "w2"))


def _nemotron(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for the biases that no release has."""
    decoder.refuse(hf, attention_bias=False, mlp_bias=False, hidden_act="relu2")
    return decoder.transformer_fields(hf) | dict(
        normalization="LayerNorm",
        layernorm_epsilon=hf.get("norm_eps", 1e-5),
        layernorm_zero_centered_gamma=True,
        gated_linear_unit=False,
        activation_func="squared_relu",
    )


FAMILIES = (
    Family("LlamaForCausalLM", _llama, decoder.gpt_fields, decoder.tensor_maps),
    Family("MistralForCausalLM", _mistral, decoder.gpt_fields, decoder.tensor_maps),
    Family(
        "MixtralForCausalLM", _mixtral, decoder.gpt_fields, partial(decoder.tensor_maps, feed_forward=_mixtral_experts)
    ),
    Family(
        "NemotronForCausalLM",
        _nemotron,
        decoder.gpt_fields,
        partial(decoder.tensor_maps, feed_forward=decoder.plain_mlp, norm_bias=True),
    ),
)
