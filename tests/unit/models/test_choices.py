"""The choices over every set of capabilities and every wish, against rules stated a second time, one by one."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import (
    AdamImplementation,
    Fp8Format,
    Fp8Recipe,
    LayerSpec,
    ModelConfig,
    QuantizedFormat,
    RolloutConfig,
)
from megatron_rl.models.capabilities import Capabilities
from megatron_rl.models.choices import Choices, check_engines, choose

GPUS = (None, (8, 0), (8, 9), (9, 0), (10, 0))
FLASH = ((), (2,), (3,), (2, 4))
MACHINES = [
    Capabilities(gpu, *installed)
    for gpu in GPUS
    for installed in itertools.product([False, True], [False, True], [False, True], FLASH)
]
AUTO = AdamImplementation.auto
FUSIONS = ("gradient_accumulation_fusion", "apply_rope_fusion", "bias_activation_fusion", "masked_softmax_fusion")
HOPPER = Capabilities((9, 0), transformer_engine=True, apex=True, fused_weight_gradient=True, flash_attention=(2, 3))


def possible_fusions(machine: Capabilities) -> dict[str, bool]:
    return {
        "gradient_accumulation_fusion": machine.gpu and machine.fused_weight_gradient,
        "apply_rope_fusion": machine.gpu and machine.transformer_engine,
        "bias_activation_fusion": machine.gpu,
        "masked_softmax_fusion": False,
    }


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_automatic_choices(machine: Capabilities) -> None:
    chosen = choose(machine, ModelConfig(), AUTO)
    engine = machine.gpu and machine.transformer_engine
    assert (chosen.layer_spec is LayerSpec.transformer_engine) == engine
    assert chosen.layer_spec is not LayerSpec.auto
    adam = "torch"
    if machine.gpu and machine.apex:
        adam = "apex"
    if engine:
        adam = "transformer_engine"
    assert chosen.optimizer.value == adam
    assert {name: getattr(chosen, name) for name in FUSIONS} == possible_fusions(machine)
    assert chosen.flash_attention_version is None
    assert chosen.attention == ("torch" if not engine else "flash" if machine.flash_attention else "fused")


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_nothing_is_taken_that_only_a_gpu_has(machine: Capabilities) -> None:
    if not machine.gpu:
        portable = Choices(LayerSpec.portable, AdamImplementation.torch, False, False, False, False, "torch")
        assert choose(machine, ModelConfig(), AUTO) == portable


def chosen_or_refused(machine: Capabilities, model: ModelConfig, adam: AdamImplementation = AUTO) -> Choices | str:
    try:
        return choose(machine, model, adam)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("wish", LayerSpec)
def test_layers_as_wished_or_refused(machine: Capabilities, wish: LayerSpec) -> None:
    found = chosen_or_refused(machine, ModelConfig(layer_spec=wish))
    if wish is LayerSpec.transformer_engine and not (machine.gpu and machine.transformer_engine):
        reason = "Transformer Engine is not installed" if machine.gpu else "there is no GPU"
        assert found == f"model.layer_spec: given transformer_engine, allowed: auto, portable: {reason}"
    else:
        assert isinstance(found, Choices)
        assert wish in (LayerSpec.auto, found.layer_spec)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("wish", AdamImplementation)
def test_adam_as_wished_or_refused(machine: Capabilities, wish: AdamImplementation) -> None:
    found = chosen_or_refused(machine, ModelConfig(), wish)
    installed = {"transformer_engine": machine.transformer_engine, "apex": machine.apex}
    if wish.value in installed and not (machine.gpu and installed[wish.value]):
        assert isinstance(found, str)
        assert found.startswith(f"optimizer.implementation: given {wish.value}, allowed: auto")
        assert ("there is no GPU" in found) == (not machine.gpu)
    else:
        assert isinstance(found, Choices)
        assert wish in (AUTO, found.optimizer)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("wish", [False, True])
def test_fusions_as_wished_or_refused(machine: Capabilities, name: str, wish: bool) -> None:
    found = chosen_or_refused(machine, ModelConfig(transformer_config={name: wish}))
    if wish and not possible_fusions(machine)[name]:
        assert isinstance(found, str)
        assert found.startswith(f"model.transformer_config.{name}: given True, allowed: false; true needs ")
    else:
        assert isinstance(found, Choices)
        assert getattr(found, name) is wish
        others = {other: getattr(found, other) for other in FUSIONS if other != name}
        assert others == {other: can for other, can in possible_fusions(machine).items() if other != name}


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("recipe", [None, *Fp8Recipe])
def test_fp8_where_the_gpu_has_it(machine: Capabilities, recipe: Fp8Recipe | None) -> None:
    found = chosen_or_refused(machine, ModelConfig(fp8=Fp8Format.hybrid, fp8_recipe=recipe))
    if not (machine.gpu and machine.transformer_engine):
        assert isinstance(found, str)
        assert found.startswith("model.fp8: given hybrid, allowed: null: ")
        return
    # Ada (8.9) brought FP8 tensor cores; blockwise scales need Hopper (9.0), mxfp8 the units of Blackwell (10.0).
    oldest = {Fp8Recipe.blockwise: (9, 0), Fp8Recipe.mxfp8: (10, 0)}.get(recipe or Fp8Recipe.tensorwise, (8, 9))
    assert machine.compute_capability is not None
    if machine.compute_capability >= oldest:
        assert isinstance(found, Choices)
    else:
        assert isinstance(found, str)
        assert found.startswith("model.fp8_recipe: given ")


def test_a_refused_recipe_names_those_that_run() -> None:
    model = ModelConfig(fp8=Fp8Format.e4m3, fp8_recipe=Fp8Recipe.mxfp8)
    assert chosen_or_refused(HOPPER, model) == (
        "model.fp8_recipe: given mxfp8, allowed: delayed, tensorwise, blockwise: it needs Blackwell or newer, "
        "this GPU is 9.0"
    )
    ampere = chosen_or_refused(replace(HOPPER, compute_capability=(8, 0)), model)
    assert "allowed: null with model.fp8=null" in str(ampere)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("layers", LayerSpec)
def test_batch_invariance_needs_flash_attention_in_transformer_engines_layers(
    machine: Capabilities, layers: LayerSpec
) -> None:
    found = chosen_or_refused(machine, ModelConfig(batch_invariant_mode=True, layer_spec=layers))
    engine = machine.gpu and machine.transformer_engine and layers is not LayerSpec.portable
    # Core 0.19 wants the third generation or the fourth pinned; the third is Hopper's alone.
    generation = {((9, 0), (3,)): 3, ((9, 0), (2, 4)): 4, ((10, 0), (2, 4)): 4}
    expected = generation.get((machine.compute_capability, machine.flash_attention))  # type: ignore[arg-type]
    if engine and expected:
        assert isinstance(found, Choices)
        assert (found.attention, found.flash_attention_version) == ("flash", expected)
    else:
        assert isinstance(found, str)
        assert found.split(":")[0] in ("model.batch_invariant_mode", "model.layer_spec")


@pytest.mark.parametrize(
    ("hf", "refused"),
    [
        ({"hidden_act": "silu", "model_type": "qwen3"}, set()),
        ({"hidden_act": "relu2", "model_type": "nemotron"}, {"bias_activation_fusion"}),
        ({"hidden_act": "silu", "model_type": "gpt_oss"}, {"bias_activation_fusion"}),
        ({"hidden_act": "silu", "model_type": "deepseek_v3", "kv_lora_rank": 512}, {"apply_rope_fusion"}),
    ],
)
def test_models_without_a_kernel_go_without(hf: dict[str, Any], refused: set[str]) -> None:
    fields = choose(HOPPER, ModelConfig(), AUTO).transformer_fields(hf)
    expected = possible_fusions(HOPPER) | dict.fromkeys(refused, False)
    assert fields == expected


def test_choices_are_one_line() -> None:
    assert str(choose(HOPPER, ModelConfig(), AUTO)) == (
        "layers transformer_engine; attention flash; Adam transformer_engine; fusions weight gradient, rope, activation"
    )
    assert str(choose(Capabilities(), ModelConfig(), AUTO)) == (
        "layers portable; attention torch; Adam torch; fusions none"
    )


def test_engines_in_int8_where_its_products_are_wrong() -> None:
    int8 = RolloutConfig(quantization=QuantizedFormat.int8)
    check_engines(Capabilities(), int8)
    check_engines(Capabilities(exact_int8=False), RolloutConfig(quantization=QuantizedFormat.fp8))
    with pytest.raises(ConfigError, match=r"rollout\.quantization: given int8, allowed: null, fp8, .* no VNNI"):
        check_engines(Capabilities(exact_int8=False), int8)
