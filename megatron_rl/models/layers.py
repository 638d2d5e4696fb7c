"""Layer specs: which classes core builds a decoder's layers from, portable ones or Transformer Engine's.

The portable ones are core's local layers, without Transformer Engine, with sequence parallelism, packing, latent
attention and experts with biases. What core's own do not do is here:

    PortableNorm      LayerNorm and RMSNorm in torch, also under sequence parallelism. Core's torch norm refuses that
                      because its weight does not say that its gradient is a partial sum over the tensor-parallel ranks;
                      this one says so (`sequence_parallel` on the parameter), and core adds it up
    ReplicatedLinear, ExpertRowParallelLinear   linear layers held whole, and of experts with a bias
    PackedRouter      core's router for micro-batches with padding, which counts neither for balance nor for the bias of
                      experts. Padding depends on the layout (`engine/micro_batch_part.py`), what is computed may not.
                      Core takes a mask of it; these are the two places where the mask alone is not enough
"""

import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from megatron_rl.device import this_device
from megatron_rl.models.attention import PortableAttention
from megatron_rl.models.capabilities import capabilities


class PortableNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, computed in float32 and returned in the input's dtype.

    Args:
        config: `normalization` chooses the kind, `layernorm_zero_centered_gamma` whether weights are around 0;
            `sequence_parallel`, `params_dtype` are those of the model.
        hidden_size: channels.
        eps: added to the (mean) square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        device = torch.device("cpu") if config.use_cpu_initialization else this_device()
        # Weights around 0 stand for 1 + weight.
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        initial = torch.full((hidden_size,), 1.0 - self.offset, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(initial)
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros_like(initial))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        weight = self.weight + self.offset if self.offset else self.weight
        if self.bias is None:
            return torch.nn.functional.rms_norm(x, weight.shape, weight, self.eps)
        return torch.nn.functional.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole: latent attention's projections to the latents.

    Built by core's latent attention with its arguments; those not named are not needed here. The output of the
    projection for keys and values ends in the channels that all heads share as their rotary key. Without sequence
    parallelism each rank goes on with the heads that it holds, so the gradient of those channels is a partial sum,
    which core does not add up; it is added up here.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Any,
        tp_comm_buffer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else this_device()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        shared_key = tp_comm_buffer_name == "kv_down_proj" and not config.sequence_parallel
        self.partial_channels: int = config.qk_pos_emb_head_dim if shared_key else 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input_size] -> [..., output_size]."""
        out = nn.functional.linear(x, self.weight)
        if self.partial_channels:
            latent, key = out.split([out.shape[-1] - self.partial_channels, self.partial_channels], dim=-1)
            out = torch.cat([latent, copy_to_tensor_model_parallel_region(key)], dim=-1)
        return out, None


class ExpertRowParallelLinear(RowParallelLinear):
    """Core's, with an output that may be changed in place: core adds an expert's bias to it so, which autograd refuses
    for the view that its own returns where experts are not split."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, input_size / ranks] -> [T, output_size], and the bias that is yet to be added."""
        out, bias = super().forward(x)
        return out if bias is None else out.clone(), bias


class PackedRouter(TopKRouter):
    """Routes each token to its best experts.

    Auxiliary losses are attached here as sums over this rank's tokens, for a scale of 1 / (tokens of the global batch),
    see `engine.routing.scale_auxiliary_losses`. Core's own are means that it multiplies by a number of tokens again
    where `calculate_per_token_loss` is set: by those of this rank in 0.16 and up, by this number times the ranks that
    share a row in 0.19. Of both, padding leaves unequal numbers, and none in the row of a rank without work.
    """

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach the load-balancing loss of a micro-batch, E * coefficient * sum_i f_i P_i, to the probabilities.

        f_i is the part of the micro-batch's choices that expert i got, P_i its score (Switch Transformer,
        arXiv:2101.03961, eq. 4), here summed over this rank's tokens. Collective over the ranks that share a
        micro-batch's tokens.

        Args:
            probs: [tokens, E], of which the router's output is made.
            scores_for_aux_loss: [tokens, E], 0 on padding.
            routing_map: [tokens, E] bool, false on padding.
            with_padding_mask: whether there was a mask; without it every token counts.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient:
            return probs
        choices = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)
        parts = choices / choices.sum().clamp(min=1)
        loss = coefficient * self.config.num_moe_experts * (parts * scores_for_aux_loss.sum(dim=0)).sum()
        return moe_utils.MoEAuxLossAutoScaler.apply(probs, loss)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach coefficient * sum of squared log-sum-exps (ST-MoE, arXiv:2202.08906, eq. 5) to logits [tokens, E].

        Args:
            padding_mask: [tokens] bool, true on padding.
        """
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        squares = logits.logsumexp(dim=-1).square()
        if padding_mask is not None:
            squares = squares.masked_fill(padding_mask, 0.0)
        return moe_utils.MoEAuxLossAutoScaler.apply(logits, coefficient * squares.sum())

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the choices, by which the bias of experts is moved after the step; [tokens, E] and [tokens].

        Core's own lays the mask over the experts in place of the tokens.
        """
        if self.enable_expert_bias and torch.is_grad_enabled():
            counted = routing_map if padding_mask is None else routing_map[~padding_mask]
            self.local_tokens_per_expert += counted.sum(dim=0)


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
    config: TransformerConfig, *, use_transformer_engine: bool, vp_stage: int | None = None
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
