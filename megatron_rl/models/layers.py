"""Layer specs: which classes core builds a decoder's layers from, portable ones or Transformer Engine's.

The portable ones are core's local layers with our norm, attention and a few linear layers: no Transformer Engine, with
sequence parallelism, packing, latent attention and experts with biases.
"""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_rl.models.attention import PortableAttention
from megatron_rl.models.capabilities import capabilities
from megatron_rl.models.norm import PortableNorm
from megatron_rl.models.portable_linear import ExpertRowParallelLinear, ReplicatedLinear

_NORMS = ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "kv_layernorm")
_DOWN_PROJECTIONS = ("linear_q_down_proj", "linear_kv_down_proj")


def decoder_layers(
    config: TransformerConfig, *, use_transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of the chunk `vp_stage` of it, dense ones and those with experts."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    if not use_transformer_engine:
        _complete_local_layers()
        for layer in block.layer_specs:
            _make_portable(layer.submodules)
        block.layer_norm = PortableNorm
    return block


def _make_portable(layer: Any) -> None:
    attention = layer.self_attention.submodules
    for part in (layer, attention):
        for name in _NORMS:
            if getattr(part, name, IdentityOp) is not IdentityOp:
                setattr(part, name, PortableNorm)
    attention.core_attention = PortableAttention
    for name in _DOWN_PROJECTIONS:
        if hasattr(attention, name):
            setattr(attention, name, ReplicatedLinear)
    if layer.mlp.module is MoELayer:
        layer.mlp.submodules.experts.submodules.linear_fc2 = ExpertRowParallelLinear


def _complete_local_layers() -> None:
    """Give core's modules the names that they only define beside Transformer Engine and yet use without it."""
    from megatron.core.transformer import multi_latent_attention

    for name in ("te_general_gemm", "fused_topk_with_score_function"):
        if not hasattr(moe_utils, name):
            setattr(moe_utils, name, None)
    # The class of projections to the latents that core allows beside column-parallel ones; it compares identities.
    multi_latent_attention.Linear = ReplicatedLinear
    if not capabilities().transformer_engine:  # core takes the stand-ins that it imports for the real classes
        multi_latent_attention.HAVE_TE = False
