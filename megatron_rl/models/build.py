"""From a Hugging Face config to this rank's chunk of a Megatron-Core GPTModel.

The one place that constructs models, because that is what changes most between releases of core: arguments are given
by keyword and filtered by what the installed release knows.

Rotary frequencies are put into the model after it is built: Megatron's rotary embedding takes a base and has one
scaling built in with fixed constants, and a checkpoint has parameters of its own. YaRN is core's own, given its
parameters.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.device import HAS_CUDA, this_device
from megatron_rl.models.families import family_of
from megatron_rl.models.families.decoder import rope_parameters, yarn_attributes
from megatron_rl.models.layers import decoder_layers
from megatron_rl.models.tensor_map import padded_vocabulary_size


def known_arguments(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that `function` of the installed release takes."""
    if dataclasses.is_dataclass(function):
        return {
            name: value for name, value in arguments.items() if name in {f.name for f in dataclasses.fields(function)}
        }
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def transformer_config(hf: dict[str, Any], *, dtype: torch.dtype, overrides: dict[str, Any]) -> TransformerConfig:
    """Megatron's TransformerConfig of a Hugging Face config, for the parallel layout that is initialised.

    Args:
        hf: config.json.
        dtype: of parameters and activations.
        overrides: further TransformerConfig fields by Megatron's names; they win.

    Raises:
        UserError: unknown architecture, an option of it that is not supported, or an unknown field in `overrides`.
    """
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise UserError(f"model.transformer_config: unknown field '{unknown[0]}' of Megatron's TransformerConfig")
    fields = _layout_fields() | dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        activation_func="silu",
        use_cpu_initialization=not HAS_CUDA,
        perform_initialization=True,
        moe_token_dispatcher_type="alltoall",  # the one that takes them
        # Losses arrive divided by a global count; see engine/step.py.
        calculate_per_token_loss=True,
        # Fusions of apex and Transformer Engine, absent on a CPU.
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    fields |= family_of(hf).transformer_fields(hf) | overrides
    fields["activation_func"] = _ACTIVATIONS[fields["activation_func"]]
    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    # Core refuses micro-batches of different lengths where tokens are gathered for their experts, since gathered parts
    # must be equally long. They are: engine/micro_batch_part.py fills up what ranks compute at the same time to one
    # length.
    gathers = bool(fields.get("num_moe_experts")) and fields["moe_token_dispatcher_type"] == "allgather"
    config = kind(**known_arguments(kind, fields | ({"variable_seq_lengths": False} if gathers else {})))
    config.variable_seq_lengths = fields["variable_seq_lengths"]
    rope = rope_parameters(hf)
    if rope["rope_type"] == "yarn":
        for name, value in yarn_attributes(rope).items():
            setattr(config, name, value)
    return config


def _layout_fields() -> dict[str, Any]:
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    pipeline_size = parallel_state.get_pipeline_model_parallel_world_size()
    return dict(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=pipeline_size,
        virtual_pipeline_model_parallel_size=chunks,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        # The micro-batches of a step differ in length, so pipeline stages tell each other the shape.
        variable_seq_lengths=pipeline_size > 1,
        # With two interleaved stages both neighbours are the same rank. Forward and backward messages in one batch
        # would be taken for each other, so they are sent one by one, and then may overlap with computation.
        overlap_p2p_comm=chunks is not None,
        batch_p2p_comm=chunks is None,
        batch_p2p_sync=HAS_CUDA,
    )


def build_gpt_model(
    hf: dict[str, Any],
    config: TransformerConfig,
    *,
    use_transformer_engine: bool,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """This pipeline stage's GPTModel, or one chunk of it, randomly initialised from core's RNG tracker.

    Args:
        hf: config.json.
        config: of `transformer_config`.
        use_transformer_engine: Transformer Engine's layers instead of the portable ones.
        pre_process, post_process: whether this chunk holds the embedding and the output layer.
        vp_stage: number of the chunk; None: the stage is not cut into several.

    Returns:
        The model on this rank's device, with parameters of config.params_dtype. Its vocabulary is padded to a
        multiple of the tensor-parallel size.
    """
    arguments = dict(
        config=config,
        transformer_layer_spec=decoder_layers(config, use_transformer_engine=use_transformer_engine, vp_stage=vp_stage),
        vocab_size=padded_vocabulary_size(hf["vocab_size"], config.tensor_model_parallel_size),
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        vp_stage=vp_stage,
        **family_of(hf).gpt_fields(hf),
    )
    model = GPTModel(**known_arguments(GPTModel.__init__, arguments))
    if not config.perform_initialization:
        _mark_shards(model)
    _reduce_over_experts_ranks(model)
    _set_rotary_frequencies(model, rope_parameters(hf))
    return model.cuda() if HAS_CUDA else model


def _reduce_over_experts_ranks(model: GPTModel) -> None:
    """Have gradients of experts that are split otherwise than the rest summed over the ranks with the same part.

    Core tells experts' parameters from others by `allreduce`, for the buffers of DistributedDataParallel, for the
    optimizer that they go to and for the norm of gradients. It only does so with expert parallelism: without, it takes
    them for dense ones, whose ranks hold the same part only if experts are split over as many ranks as all the rest.
    What it does not know to be split it counts in the norm on the first of the tensor-parallel ranks alone; of experts
    that is a bias, which only whole experts have, and every rank counts its own. With sequence parallelism it would sum
    that bias over the tensor-parallel ranks once more, which are among the ranks with the same part.
    """
    config = model.config
    if config.expert_tensor_parallel_size == config.tensor_model_parallel_size:
        return
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
            parameter.tensor_model_parallel = True
            parameter.sequence_parallel = False


def _mark_shards(model: GPTModel) -> None:
    """Mark the weights that tensor-parallel ranks share, which core does where it draws them.

    By the mark the norm of the gradient knows which weights it must take from every rank, and which from the first.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or hasattr(weight, "tensor_model_parallel"):
            continue
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(weight, True, dim, 1)


def inverse_frequencies(head_dim: int, rope: dict[str, Any]) -> Tensor:
    """Angle per position of each pair of channels.

        default:  f_i = theta^(-2i / head_dim)
        linear:   f_i / factor
        llama3:   f_i where the wavelength is below original/high_freq_factor, f_i / factor where it is above
                  original/low_freq_factor, and between the two the mean of both weighted by
                  (original/wavelength - low) / (high - low) on f_i.

    Sources: RoFormer, arXiv:2104.09864; position interpolation, arXiv:2306.15595; the Llama 3 scaling as published
    with the Llama 3.1 checkpoints (config.json, rope_type llama3).

    Returns:
        [head_dim / 2] float32, radians per position.
    """
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    assert kind == "llama3", f"{kind} has no frequencies of its own"
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope["factor"]


_ACTIVATIONS = {"silu": torch.nn.functional.silu, "quick_gelu": quick_gelu, "squared_relu": squared_relu}


def _set_rotary_frequencies(model: GPTModel, rope: dict[str, Any]) -> None:
    """Replace core's frequencies, but for YaRN, which core computes from the same parameters."""
    if rope["rope_type"] == "yarn":
        return
    if not model.config.multi_latent_attention:
        channels = int(model.config.kv_channels * rope.get("partial_rotary_factor", 1.0))
        model.rotary_pos_emb.inv_freq = inverse_frequencies(channels, rope).to(this_device())
        return
    for layer in model.decoder.layers:
        channels = model.config.qk_pos_emb_head_dim
        layer.self_attention.rotary_pos_emb.inv_freq = inverse_frequencies(channels, rope).to(this_device())
