"""What the numerics of a run may be: FP8 training, quantised rollouts, and what they ask of shapes and layout.

Pure, and without a GPU: what a machine lacks is said by `models/choices.py`.
"""

from typing import Any

from megatron_rl.config.errors import refuse, shown
from megatron_rl.config.hf_checkpoint import ModelShape
from megatron_rl.config.schema import (
    Config,
    Dtype,
    Fp8Recipe,
    LayerSpec,
    ModelConfig,
    ParallelConfig,
    QuantizedFormat,
    Recipe,
    SyncVerify,
)

_TRAINABLE = (QuantizedFormat.fp8, QuantizedFormat.int8)


def fp8_recipe(model: ModelConfig) -> Fp8Recipe | None:
    """The recipe of FP8 training; None without FP8."""
    return None if model.fp8 is None else model.fp8_recipe or Fp8Recipe.tensorwise


def token_multiple(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Tokens that what a (context-parallel) rank computes of a micro-batch must be a multiple of.

        sequence parallelism    each of its ranks gets as many tokens
        FP8                     each of these parts is a multiple of 16, of 32 with mxfp8: the product that makes a
                                weight's gradient runs along the tokens, and FP8 products want their inner side so long;
                                of 128 with blockwise, whose blocks Transformer Engine else gathers in bfloat16

    Source of the FP8 sizes: Transformer Engine's products (16), blocks of mxfp8 that share a scale (32), and
    `Float8BlockQuantizer.is_quantizable` (128).
    """
    parts = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return parts * (128 if fp8_recipe(model) is Fp8Recipe.blockwise else fp8_multiple(model))


def fp8_multiple(model: ModelConfig) -> int:
    """What the sizes of an FP8 product must be multiples of; 1 without FP8."""
    recipe = fp8_recipe(model)
    return 1 if recipe is None else 32 if recipe is Fp8Recipe.mxfp8 else 16


def megatron_numerics(model: ModelConfig) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that numerics decide; none for plain training."""
    recipe = fp8_recipe(model)
    if model.fp8 is None or recipe is None:
        return {}
    return {
        "fp8": model.fp8.value,
        "fp8_recipe": recipe.value,
        "fp8_param": model.fp8_param,
        "first_last_layers_bf16": model.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": model.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": model.num_layers_at_end_in_bf16,
    }


def check_numerics(config: Config) -> None:
    """Raise ConfigError for the first combination that has no meaning or does not work."""
    _check_fp8(config)
    _check_quantization(config)
    if config.model.batch_invariant_mode and config.parallel.context_parallel_size > 1:
        allowed = "1 with model.batch_invariant_mode: attention over several ranks has other kernels"
        refuse("parallel.context_parallel_size", config.parallel.context_parallel_size, allowed)


def check_fp8_shapes(config: Config, shape: ModelShape) -> None:
    """Raise ConfigError if a rank's part of a weight has a side that FP8 products do not take."""
    if config.model.fp8 is None:
        return
    multiple, tp = fp8_multiple(config.model), config.parallel.tensor_model_parallel_size
    sides = {
        "hidden_size": shape.hidden_size,
        "intermediate_size / tensor_model_parallel_size": shape.intermediate_size // tp,
    }
    for name, size in sides.items():
        if size % multiple:
            refuse("model.fp8", config.model.fp8, f"null: {name} is {size}, and FP8 needs a multiple of {multiple}")
    stage = shape.num_hidden_layers // config.parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if config.model.first_last_layers_bf16 and getattr(config.model, name) > stage:
            refuse(f"model.{name}", getattr(config.model, name), f"at most {stage}, the layers of a pipeline stage")
    kept = config.model.num_layers_at_start_in_bf16 + config.model.num_layers_at_end_in_bf16
    if config.model.first_last_layers_bf16 and kept >= shape.num_hidden_layers:
        given = f"{kept} layers in bfloat16"
        refuse("model.first_last_layers_bf16", given, f"fewer than the model's {shape.num_hidden_layers} layers")


def _check_fp8(config: Config) -> None:
    model = config.model
    if model.fp8 is None:
        for name, default in (("fp8_recipe", None), ("fp8_param", False), ("first_last_layers_bf16", False)):
            if getattr(model, name) != default:
                refuse(f"model.{name}", getattr(model, name), f"{shown(default)} without model.fp8")
        return
    if model.params_dtype is not Dtype.bfloat16:
        refuse("model.params_dtype", model.params_dtype, "bfloat16 with model.fp8: what is not FP8 is bfloat16")
    if model.layer_spec is LayerSpec.portable:
        refuse("model.layer_spec", model.layer_spec, "transformer_engine with model.fp8: its layers alone have FP8")
    recipe = fp8_recipe(model)
    if recipe is Fp8Recipe.delayed and model.first_last_layers_bf16:
        allowed = (
            "tensorwise, blockwise, mxfp8 with first_last_layers_bf16: delayed scaling is one context for all layers"
        )
        refuse("model.fp8_recipe", recipe, allowed)
    if model.fp8_param and not config.optimizer.use_distributed_optimizer:
        refuse(
            "model.fp8_param", True, "false without optimizer.use_distributed_optimizer, which holds the float32 copy"
        )
    if model.fp8_param and recipe is Fp8Recipe.mxfp8:
        refuse("model.fp8_param", True, "false with fp8_recipe mxfp8: core then wants overlapped gathers, unused here")
    if model.quantization is not None:
        refuse("model.quantization", model.quantization, "null with model.fp8: layers are quantised by one of the two")
    if config.algorithm.kl.coefficient and model.fp8_param:
        refuse("model.fp8_param", True, "false with algorithm.kl.coefficient: the reference is swapped in as bfloat16")


def _check_quantization(config: Config) -> None:
    model, rollout = config.model, config.rollout
    others = "; `megatron-rl quantize` makes checkpoints of the others"
    if model.quantization is not None and model.quantization not in _TRAINABLE:
        refuse("model.quantization", model.quantization, f"fp8, int8{others}")
    if rollout.quantization not in (None, QuantizedFormat.fp8_block, *_TRAINABLE):
        refuse("rollout.quantization", rollout.quantization, f"fp8, fp8_block, int8{others}")
    if model.quantization is None:
        if rollout.quantization is not None and config.sync.verify is not SyncVerify.off:
            allowed = "off with rollout.quantization unless model.quantization is the same: log-probs differ"
            refuse("sync.verify", config.sync.verify.name, allowed)
        return
    if config.recipe is Recipe.rl and rollout.quantization is not model.quantization:
        refuse("rollout.quantization", rollout.quantization, f"{model.quantization.value}, as model.quantization")
    if rollout.tensor_model_parallel_size > 1:
        allowed = "1 with model.quantization: vLLM scales what each of its ranks holds of a token's inputs on its own"
        refuse("rollout.tensor_model_parallel_size", rollout.tensor_model_parallel_size, allowed)
