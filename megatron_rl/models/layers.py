"""Layer specs: which classes core builds a decoder's layers from, portable ones or Transformer Engine's.

The portable ones are core's local layers with our norm, attention and a few linear layers: no Transformer Engine, with
sequence parallelism, packing, latent attention and experts with biases.
"""

import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_rl.models.attention import PortableAttention
from megatron_rl.models.capabilities import capabilities
from megatron_rl.models.norm import PortableNorm
from megatron_rl.models.portable_linear import ExpertRowParallelLinear, ReplicatedLinear
from megatron_rl.models.router import PackedRouter

_NORMS = ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "kv_layernorm")
_DOWN_PROJECTIONS = ("linear_q_down_proj", "linear_kv_down_proj")


class _SpecifiedLatentAttention(MLASelfAttention):
    """Latent attention of the layers that its spec names.

    From 0.19 on core chooses them itself, and without a latent of the queries it cannot but fuse a norm of Transformer
    Engine's into their projection, also where the model has a norm of keys and values alone.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def decoder_layers(
    config: TransformerConfig, *, use_transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of the chunk `vp_stage` of it, dense ones and those with experts."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in block.layer_specs:
        mlp = _submodules(layer.submodules.mlp)
        if hasattr(mlp, "router"):
            mlp.router = PackedRouter
    if not use_transformer_engine:
        _complete_local_layers()
        for layer in block.layer_specs:
            _make_portable(layer.submodules)
            if config.multi_latent_attention:
                layer.submodules.self_attention.module = _SpecifiedLatentAttention
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
    experts = getattr(_submodules(layer.mlp), "experts", None)
    if experts is not None:
        _submodules(experts).linear_fc2 = ExpertRowParallelLinear


def _submodules(part: Any) -> Any:
    """Of a part's spec; later cores describe some parts by a partial function in its place."""
    return part.keywords["submodules"] if isinstance(part, functools.partial) else part.submodules


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
