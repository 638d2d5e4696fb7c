"""Multi-head latent attention (DeepSeek): queries and keys of a part without and a part with rotary embedding.

Keys and values of all heads come from one latent vector of `kv_lora_rank` channels, queries from one of `q_lora_rank`
or straight from the hidden state. The projections down to the latents are held whole by every tensor-parallel rank.
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import decoder
from megatron_rl.models.families.decoder import norm, ours, theirs
from megatron_rl.models.rope_parameters import rope_parameters, yarn_concentration
from megatron_rl.models.tensor_map import TensorMap, replicated, split


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of Megatron's MLATransformerConfig that are not those of any decoder.

    Raises:
        UserError: a rotary scaling that core's latent attention does not express.
    """
    decoder.refuse(hf, attention_bias=False)
    rope = rope_parameters(hf)
    fields = dict(
        multi_latent_attention=True,
        qk_layernorm=True,
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        kv_channels=hf["v_head_dim"],
        num_query_groups=hf["num_attention_heads"],
        rope_type="rope",
        rotary_base=rope["rope_theta"],
        rotary_scaling_factor=1.0,
    )
    if rope["rope_type"] != "yarn":
        return fields
    mscale, mscale_all_dim = yarn_concentration(rope)
    if rope.get("truncate") is False or (rope.get("mscale_all_dim") and not rope.get("mscale")):
        raise UserError(
            "rope_parameters in config.json: yarn with truncate: false, or with mscale_all_dim and no mscale, is not "
            "supported for latent attention; allowed: truncate: true, mscale and mscale_all_dim or neither"
        )
    return fields | dict(
        rope_type="yarn",
        rotary_scaling_factor=rope["factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        mscale=1.0 if mscale is None else mscale,
        mscale_all_dim=0.0 if mscale_all_dim is None else mscale_all_dim,
    )


def attention(hf: dict[str, Any], layer: int) -> list[TensorMap]:
    """The attention of one layer. Rows of the up projections go head by head, as in Megatron."""
    prefix, hf_prefix = f"{ours(layer)}self_attention.", f"{theirs(layer)}self_attn."
    hidden, heads, nope, rope = (
        hf[key] for key in ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    q_rank, kv_rank, value = hf.get("q_lora_rank"), hf["kv_lora_rank"], hf["v_head_dim"]
    queries = heads * (nope + rope)
    if q_rank is None:
        maps = [split(f"{prefix}linear_q_proj.weight", f"{hf_prefix}q_proj.weight", (queries, hidden), dim=0)]
    else:
        maps = [
            replicated(f"{prefix}linear_q_down_proj.weight", f"{hf_prefix}q_a_proj.weight", (q_rank, hidden)),
            *norm(f"{prefix}q_layernorm", f"{hf_prefix}q_a_layernorm", q_rank),
            split(f"{prefix}linear_q_up_proj.weight", f"{hf_prefix}q_b_proj.weight", (queries, q_rank), dim=0),
        ]
    down, up, out = (f"{hf_prefix}{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
    return [
        *maps,
        replicated(f"{prefix}linear_kv_down_proj.weight", down, (kv_rank + rope, hidden)),
        *norm(f"{prefix}kv_layernorm", f"{hf_prefix}kv_a_layernorm", kv_rank),
        split(f"{prefix}linear_kv_up_proj.weight", up, (heads * (nope + value), kv_rank), dim=0),
        split(f"{prefix}linear_proj.weight", out, (hidden, heads * value), dim=1),
    ]
