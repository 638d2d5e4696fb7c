"""What the dense decoders of Hugging Face share: RMSNorm, rotary embedding, grouped-query attention, gated MLP.

A family says how it differs (bias on the attention input, norms of queries and keys, rotary scaling); its table of
tensors and its TransformerConfig fields come from here.
"""

from typing import Any

from megatron_rl.models.tensor_map import TensorMap, gate_up, qkv, replicated, split, vocabulary


def head_dim(hf: dict[str, Any]) -> int:
    """Channels of one attention head."""
    return int(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that follow from config.json of any dense decoder."""
    return dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf.get("num_key_value_heads", hf["num_attention_heads"]),
        kv_channels=head_dim(hf),
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        gated_linear_unit=True,
        add_bias_linear=False,
    )


def gpt_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GPTModel that follow from config.json."""
    return dict(
        max_sequence_length=hf["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings", False)),
    )


def tensor_maps(hf: dict[str, Any], *, qkv_bias: bool = False, qk_norm: bool = False) -> list[TensorMap]:
    """The table of a dense decoder, in the order of the layers."""
    hidden, ffn = hf["hidden_size"], hf["intermediate_size"]
    heads = hf["num_attention_heads"]
    shape: dict[str, Any] = dict(
        num_heads=heads, num_groups=hf.get("num_key_value_heads", heads), head_dim=head_dim(hf)
    )
    maps = [vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", (hf["vocab_size"], hidden))]
    for layer in range(hf["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, q, k, v = (
            f"{theirs}self_attn.{part}" for part in ("o_proj.weight", "q_proj.", "k_proj.", "v_proj.")
        )
        input_projection = f"{ours}self_attention.linear_qkv."
        maps += [
            replicated(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (hidden,)),
            qkv(f"{input_projection}weight", f"{q}weight", f"{k}weight", f"{v}weight", columns=(hidden,), **shape),
        ]
        if qkv_bias:
            maps.append(qkv(f"{input_projection}bias", f"{q}bias", f"{k}bias", f"{v}bias", columns=(), **shape))
        if qk_norm:
            maps += [
                replicated(
                    f"{ours}self_attention.{x}_layernorm.weight", f"{theirs}self_attn.{x}_norm.weight", (head_dim(hf),)
                )
                for x in ("q", "k")
            ]
        maps += [
            split(f"{ours}self_attention.linear_proj.weight", attention, (hidden, heads * head_dim(hf)), dim=1),
            replicated(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (hidden,)),
            gate_up(
                f"{ours}mlp.linear_fc1.weight",
                f"{theirs}mlp.gate_proj.weight",
                f"{theirs}mlp.up_proj.weight",
                (ffn, hidden),
            ),
            split(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (hidden, ffn), dim=1),
        ]
    maps.append(replicated("decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    if not hf.get("tie_word_embeddings", False):
        maps.append(vocabulary("output_layer.weight", "lm_head.weight", (hf["vocab_size"], hidden)))
    return maps
