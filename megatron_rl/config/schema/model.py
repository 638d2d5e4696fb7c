"""The policy, its numerics and its layout."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Dtype(Enum):
    """Dtype of the model's parameters and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LayerSpec(Enum):
    """Implementation of the transformer layer."""

    auto = "auto"
    portable = "portable"
    transformer_engine = "transformer_engine"


class Fp8Format(Enum):
    """Number formats of FP8 training: E4M3 everywhere, or E4M3 forward and E5M2, of wider range, for gradients."""

    e4m3 = "e4m3"
    hybrid = "hybrid"


class Fp8Recipe(Enum):
    """How FP8 training scales its tensors; see Transformer Engine's recipes."""

    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class QuantizedFormat(Enum):
    """Formats of quantised weights; see `weights/quantized/formats.py`."""

    fp8 = "fp8"
    fp8_block = "fp8_block"
    int8 = "int8"
    int4 = "int4"
    nvfp4 = "nvfp4"


@dataclass
class ModelConfig:
    """The policy."""

    hf_path: str = MISSING
    """Folder of a Hugging Face checkpoint: config.json, *.safetensors, tokenizer files."""
    load_weights: bool = True
    """False starts from random weights, drawn from `seed`; only config.json and the tokenizer are read."""
    params_dtype: Dtype = Dtype.bfloat16
    """Dtype of parameters and activations; log-probs, losses and the optimizer's state are float32 always."""
    layer_spec: LayerSpec = LayerSpec.auto
    """auto takes Transformer Engine where it is installed and a GPU is present, else the portable layers."""
    moe_routing_replay: bool = False
    """Send the tokens of an update to the experts that the pass over the old policy chose, of use where a rollout is
    trained on by more than one update; or with rollout.record_routes to those that the engine chose. Only for models
    with experts."""
    recompute_granularity: str | None = None
    """Activation recomputation: null, 'selective' (core attention) or 'full' (whole layers)."""
    recompute_method: str | None = None
    """With 'full': 'uniform' or 'block'."""
    recompute_num_layers: int | None = None
    """With 'full': layers per recomputed unit ('uniform'), or recomputed layers per stage ('block')."""
    fp8: Fp8Format | None = None
    """Train in FP8 with Transformer Engine's layers on a GPU: e4m3 or hybrid. null: in params_dtype."""
    fp8_recipe: Fp8Recipe | None = None
    """With fp8: delayed, tensorwise, blockwise (Hopper) or mxfp8 (Blackwell). null: tensorwise."""
    fp8_param: bool = False
    """With fp8: keep the weights in FP8 too, and gather them so; the optimizer's own copy is float32 as ever."""
    first_last_layers_bf16: bool = False
    """With fp8: the first and the last layers compute in bfloat16."""
    num_layers_at_start_in_bf16: int = 1
    """How many first layers first_last_layers_bf16 means."""
    num_layers_at_end_in_bf16: int = 1
    """How many last layers first_last_layers_bf16 means."""
    batch_invariant_mode: bool = False
    """Kernels whose result does not depend on the batch, in training and in engines, on a GPU: slower, and rollout and
    training log-probs agree as far as the two libraries allow."""
    quantization: QuantizedFormat | None = None
    """fp8 or int8: fake-quantise the layers in training and in log-probs, so that the policy computes as engines with
    the same rollout.quantization do (quantisation-aware training). Runs on any device."""
    transformer_config: dict[str, Any] = field(default_factory=dict)
    """Any further field of Megatron's TransformerConfig, by its own name. Overrides what the checkpoint says."""


@dataclass
class ParallelConfig:
    """How the training ranks share the model and the batch."""

    tensor_model_parallel_size: int = 1
    """Ranks that split every layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers that each pipeline stage holds, taken in turn: a smaller bubble for more messages. null: one."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, where it also holds the embedding; null: as many as the others."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, where it also holds the output layer; null: as many as the others."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when the layers are split evenly."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer as a layer when the layers are split evenly."""
    context_parallel_size: int = 1
    """Ranks that split every sequence of a micro-batch, each taking an early and a late part of it (zig-zag)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of MoE layers; they come from the tensor, context and data ranks of a stage."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each expert's matrices; null: tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks by sequence; needs tensor_model_parallel_size > 1."""
    data_parallel_size: int | None = None
    """Replicas. null: what the started ranks leave (1 when `megatron-rl train` starts them itself)."""
    distributed_timeout_minutes: int = 10
    """Limit of any collective wait."""
