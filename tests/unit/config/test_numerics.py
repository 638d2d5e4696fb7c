"""FP8 and quantised configurations: what micro-batches are padded to, and which combinations are refused with which
reason."""

import itertools
from typing import Any

import pytest

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.hf_checkpoint import ModelShape
from megatron_rl.config.numerics import check_fp8_shapes, check_numerics, fp8_recipe, token_multiple
from megatron_rl.config.schema import (
    Config,
    Dtype,
    Fp8Format,
    Fp8Recipe,
    LayerSpec,
    ModelConfig,
    ParallelConfig,
    QuantizedFormat,
    Recipe,
    SyncVerify,
)

SHAPE = ModelShape("Qwen3ForCausalLM", 4, 8, 4, 256, 512, 1000, 4096)


def config(**given: Any) -> Config:
    """A configuration with dotted keys set; FP8 by default in bfloat16."""
    made = Config(name="run")
    for key, value in given.items():
        owner: Any = made
        *path, name = key.split("__")
        for step in path:
            owner = getattr(owner, step)
        setattr(owner, name, value)
    return made


@pytest.mark.parametrize("fp8", [None, *Fp8Format])
@pytest.mark.parametrize("recipe", [None, *Fp8Recipe])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_micro_batches_are_multiples(fp8: Fp8Format | None, recipe: Fp8Recipe | None, sequence_parallel: bool) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=sequence_parallel)
    # Each of the 4 parts of a micro-batch, or the whole, is a multiple of 16; of 32 for mxfp8 and of 128 for blockwise,
    # whose blocks are so long.
    unit = 1 if fp8 is None else {Fp8Recipe.mxfp8: 32, Fp8Recipe.blockwise: 128}.get(recipe, 16)
    assert token_multiple(ModelConfig(fp8=fp8, fp8_recipe=recipe), parallel) == unit * (4 if sequence_parallel else 1)


def test_the_default_recipe_is_tensorwise() -> None:
    assert fp8_recipe(ModelConfig()) is None
    assert fp8_recipe(ModelConfig(fp8=Fp8Format.hybrid)) is Fp8Recipe.tensorwise
    assert fp8_recipe(ModelConfig(fp8=Fp8Format.hybrid, fp8_recipe=Fp8Recipe.delayed)) is Fp8Recipe.delayed


@pytest.mark.parametrize(
    ("format", "recipe", "param", "edges"),
    itertools.product(Fp8Format, [None, *Fp8Recipe], [False, True], [False, True]),
)
def test_every_fp8_combination_but_two_is_allowed(
    format: Fp8Format, recipe: Fp8Recipe | None, param: bool, edges: bool
) -> None:
    given = config(
        model__fp8=format, model__fp8_recipe=recipe, model__fp8_param=param, model__first_last_layers_bf16=edges
    )
    if recipe is Fp8Recipe.delayed and edges:
        with pytest.raises(ConfigError, match=r"model\.fp8_recipe: given delayed, .* one context for all layers"):
            check_numerics(given)
    elif recipe is Fp8Recipe.mxfp8 and param:
        with pytest.raises(ConfigError, match=r"model\.fp8_param: given True, .* overlapped gathers"):
            check_numerics(given)
    else:
        check_numerics(given)


FP8 = {"model__fp8": Fp8Format.hybrid}
QAT = {"model__quantization": QuantizedFormat.fp8, "rollout__quantization": QuantizedFormat.fp8}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model__fp8_recipe": Fp8Recipe.blockwise},
            "model.fp8_recipe: given blockwise, allowed: null without",
        ),
        ({"model__fp8_param": True}, "model.fp8_param: given True, allowed: False without model.fp8"),
        ({"model__first_last_layers_bf16": True}, "allowed: False without model.fp8"),
        ({**FP8, "model__params_dtype": Dtype.float32}, "model.params_dtype: given float32, allowed: bfloat16"),
        ({**FP8, "model__layer_spec": LayerSpec.portable}, "model.layer_spec: given portable"),
        (
            {**FP8, "model__fp8_param": True, "optimizer__use_distributed_optimizer": False},
            "false without optimizer.use_distributed_optimizer",
        ),
        ({**FP8, "model__fp8_param": True, "algorithm__kl__coefficient": 0.1}, "false with algorithm.kl.coefficient"),
        ({**FP8, **QAT}, "model.quantization: given fp8, allowed: null with model.fp8"),
        ({"model__quantization": QuantizedFormat.nvfp4}, "model.quantization: given nvfp4, allowed: fp8, int8"),
        (
            {"rollout__quantization": QuantizedFormat.int4},
            "rollout.quantization: given int4, allowed: fp8, fp8_block, int8",
        ),
        ({"model__quantization": QuantizedFormat.fp8}, "rollout.quantization: given null, allowed: fp8, as model"),
        ({**QAT, "rollout__quantization": QuantizedFormat.int8}, "rollout.quantization: given int8, allowed: fp8"),
        (
            {"model__batch_invariant_mode": True, "parallel__context_parallel_size": 2},
            "parallel.context_parallel_size: given 2, allowed: 1 with model.batch_invariant_mode",
        ),
        ({**QAT, "rollout__tensor_model_parallel_size": 2}, "rollout.tensor_model_parallel_size: given 2"),
        (
            {"rollout__quantization": QuantizedFormat.fp8, "sync__verify": SyncVerify.full},
            "sync.verify: given 'full'",
        ),
    ],
)
def test_refusals_say_why(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_numerics(config(**given))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        FP8,
        QAT,
        {**QAT, "sync__verify": SyncVerify.full},
        {**QAT, "parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2},
        {"rollout__quantization": QuantizedFormat.int8},
        {"model__quantization": QuantizedFormat.int8, "recipe": Recipe.sft},
    ],
)
def test_what_makes_sense_is_allowed(given: dict[str, Any]) -> None:
    check_numerics(config(**given))


def test_fp8_needs_sides_of_whole_blocks() -> None:
    check_fp8_shapes(config(**FP8, parallel__tensor_model_parallel_size=32), SHAPE)  # 512 / 32 = 16
    with pytest.raises(ConfigError, match=r"intermediate_size / tensor_model_parallel_size is 8, and FP8 needs .* 16"):
        check_fp8_shapes(config(**FP8, parallel__tensor_model_parallel_size=64), SHAPE)
    mxfp8 = {**FP8, "model__fp8_recipe": Fp8Recipe.mxfp8}
    with pytest.raises(ConfigError, match="is 16, and FP8 needs a multiple of 32"):
        check_fp8_shapes(config(**mxfp8, parallel__tensor_model_parallel_size=32), SHAPE)
    check_fp8_shapes(config(parallel__tensor_model_parallel_size=64), SHAPE)  # without FP8 any side will do


def test_bf16_edges_leave_fp8_layers() -> None:
    edges = {**FP8, "model__first_last_layers_bf16": True, "model__num_layers_at_start_in_bf16": 2}
    check_fp8_shapes(config(**edges, model__num_layers_at_end_in_bf16=1), SHAPE)
    with pytest.raises(ConfigError, match="fewer than the model's 4 layers"):
        check_fp8_shapes(config(**edges, model__num_layers_at_end_in_bf16=2), SHAPE)
