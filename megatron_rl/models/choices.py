"""From what a machine has and what the configuration wants to what a run takes: a pure function.

    layers                      Transformer Engine's on a GPU where it is installed, else the portable ones
    optimizer                   Transformer Engine's fused Adam, else apex's, on a GPU; else torch's
    gradient_accumulation_fusion  with apex's extension on a GPU (core's own linear layers have no other)
    apply_rope_fusion           with Transformer Engine's layers, but for latent attention and YaRN
    moe_grouped_gemm            with Transformer Engine's layers: all experts of a rank in one call
    bias_activation_fusion      on a GPU, where the activation is silu
    masked_softmax_fusion       never: both attentions bring their own softmax
    attention                   torch's in portable layers; flash-attn, else cuDNN, in Transformer Engine's

Whatever `model.layer_spec`, `optimizer.implementation` or `model.transformer_config` say goes before, and is refused
with the reason where the machine cannot do it.
"""

import math
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.hf_checkpoint import NUM_EXPERTS
from megatron_rl.config.numerics import fp8_recipe
from megatron_rl.config.schema import (
    AdamImplementation,
    Config,
    Fp8Recipe,
    LayerSpec,
    ModelConfig,
    QuantizedFormat,
    RolloutConfig,
)
from megatron_rl.models.capabilities import Capabilities
from megatron_rl.models.families.decoder import rope_parameters

_FP8_NEEDS = {
    Fp8Recipe.delayed: ((8, 9), "Ada, Hopper or newer"),
    Fp8Recipe.tensorwise: ((8, 9), "Ada, Hopper or newer"),
    Fp8Recipe.blockwise: ((9, 0), "Hopper or newer"),
    Fp8Recipe.mxfp8: ((10, 0), "Blackwell or newer"),
}
"""The oldest GPUs whose tensor cores and Transformer Engine have the recipe: compute capability and name."""

_FUSIONS = ("gradient_accumulation_fusion", "apply_rope_fusion", "bias_activation_fusion", "masked_softmax_fusion")

_NO_TE = "auto, portable: Transformer Engine is not installed"
_NO_GPU = "auto, portable: there is no GPU"


@dataclass(frozen=True)
class Choices:
    """What a run takes."""

    layer_spec: LayerSpec
    optimizer: AdamImplementation
    gradient_accumulation_fusion: bool
    apply_rope_fusion: bool
    bias_activation_fusion: bool
    masked_softmax_fusion: bool
    attention: str
    """'torch', 'flash' or 'fused' (cuDNN's)."""
    flash_attention_version: int | None = None
    """Generation that is the only one allowed, for batch invariance; None: Transformer Engine takes one."""

    def __str__(self) -> str:
        fusions = {
            "weight gradient": self.gradient_accumulation_fusion,
            "rope": self.apply_rope_fusion,
            "activation": self.bias_activation_fusion,
            "softmax": self.masked_softmax_fusion,
        }
        fused = ", ".join(name for name, taken in fusions.items() if taken) or "none"
        return (
            f"layers {self.layer_spec.value}; attention {self.attention}; Adam {self.optimizer.value}; fusions {fused}"
        )

    def transformer_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        """The fields of Megatron's TransformerConfig among them, as far as the model of a config.json has the kernels.

        Core fuses silu in gated MLPs, and rope where all of a head is rotated alike, which latent attention is not. Of
        packed rows its fused rope leaves YaRN's factor out, without a word (`rope_utils.apply_rotary_pos_emb`).
        """
        plain_silu = hf.get("hidden_act") == "silu" and hf.get("model_type") != "gpt_oss"
        fuses_rope = "kv_lora_rank" not in hf and rope_parameters(hf)["rope_type"] != "yarn"
        grouped = self.layer_spec is LayerSpec.transformer_engine and any(hf.get(name) for name in NUM_EXPERTS)
        return {
            "gradient_accumulation_fusion": self.gradient_accumulation_fusion,
            "apply_rope_fusion": self.apply_rope_fusion and fuses_rope,
            "bias_activation_fusion": self.bias_activation_fusion and plain_silu,
            "masked_softmax_fusion": self.masked_softmax_fusion,
            # One by one, experts are a launch each of every operation, and a wait for their numbers of tokens.
            **({"moe_grouped_gemm": True, "moe_permute_fusion": True} if grouped else {}),
        }

    def context_parallel_fields(
        self, *, windows_or_sinks: bool, size: int, heads_of_rank: int, key_value_heads_of_rank: int
    ) -> dict[str, Any]:
        """How Transformer Engine's attention exchanges keys and values of a context-parallel group of `size` ranks.

        Sent round from rank to rank (core's own choice) it has no windows and no sinks; exchanged for heads it has, and
        then each rank attends with its part of the heads over all tokens.

        Raises:
            ConfigError: the heads of a rank cannot be divided.
        """
        if size == 1 or not windows_or_sinks or self.layer_spec is not LayerSpec.transformer_engine:
            return {}
        heads = math.gcd(heads_of_rank, key_value_heads_of_rank)
        if heads % size:
            reason = "with windows or sinks Transformer Engine's attention divides heads among these ranks"
            _refuse("parallel.context_parallel_size", size, f"a divisor of {heads}: {reason}")
        return {"cp_comm_type": "a2a"}


def asks_for_hardware(config: Config) -> bool:
    """Whether a configuration asks for what not every machine has: `choose` or `check_engines` could refuse it."""
    model, adam = config.model, config.optimizer.implementation
    return (
        model.fp8 is not None
        or model.batch_invariant_mode
        or model.layer_spec is LayerSpec.transformer_engine
        or adam in (AdamImplementation.transformer_engine, AdamImplementation.apex)
        or any(model.transformer_config.get(name) for name in _FUSIONS)
        or config.rollout.quantization is QuantizedFormat.int8
    )


def check_engines(available: Capabilities, rollout: RolloutConfig) -> None:
    """Raise ConfigError for engines whose kernels compute something else than their weights say on this machine."""
    if rollout.quantization is QuantizedFormat.int8 and not available.exact_int8:
        reason = "this CPU has no VNNI, without which products in int8 were found wrong"
        _refuse("rollout.quantization", "int8", f"null, fp8, fp8_block: {reason}")


def choose(available: Capabilities, model: ModelConfig, optimizer: AdamImplementation) -> Choices:
    """What a run of this configuration takes on this machine.

    Args:
        available: what the machine has.
        model: the user's.
        optimizer: the user's optimizer.implementation.

    Raises:
        ConfigError: something is asked for that the machine does not have.
    """
    layers = _layer_spec(available, model)
    engine = layers is LayerSpec.transformer_engine
    _check_fp8(available, model)
    generation = _batch_invariant_attention(available, layers) if model.batch_invariant_mode else None
    return Choices(
        layer_spec=layers,
        optimizer=_optimizer(available, optimizer),
        gradient_accumulation_fusion=_fusion(
            model,
            "gradient_accumulation_fusion",
            possible=available.gpu and available.fused_weight_gradient,
            needs="a GPU and apex built with its CUDA extensions",
        ),
        apply_rope_fusion=_fusion(
            model, "apply_rope_fusion", possible=engine, needs="Transformer Engine's layers on a GPU"
        ),
        bias_activation_fusion=_fusion(model, "bias_activation_fusion", possible=available.gpu, needs="a GPU"),
        masked_softmax_fusion=_fusion(
            model,
            "masked_softmax_fusion",
            possible=False,
            needs="core's local attention, which takes no packed sequences",
        ),
        attention="torch" if not engine else "flash" if available.flash_attention else "fused",
        flash_attention_version=generation,
    )


def _layer_spec(available: Capabilities, model: ModelConfig) -> LayerSpec:
    possible = available.gpu and available.transformer_engine
    wanted = model.layer_spec
    if wanted is LayerSpec.transformer_engine and not possible:
        _refuse("model.layer_spec", wanted.value, _NO_TE if available.gpu else _NO_GPU)
    if wanted is LayerSpec.auto:
        return LayerSpec.transformer_engine if possible else LayerSpec.portable
    return wanted


def _optimizer(available: Capabilities, wanted: AdamImplementation) -> AdamImplementation:
    possible = {
        AdamImplementation.transformer_engine: available.gpu and available.transformer_engine,
        AdamImplementation.apex: available.gpu and available.apex,
        AdamImplementation.torch: True,
    }
    if wanted is AdamImplementation.auto:
        return next(implementation for implementation, can in possible.items() if can)
    if not possible[wanted]:
        names = ", ".join(["auto", *(implementation.value for implementation, can in possible.items() if can)])
        reason = f"{wanted.value} is not installed" if available.gpu else "there is no GPU"
        _refuse("optimizer.implementation", wanted.value, f"{names}: {reason}")
    return wanted


def _check_fp8(available: Capabilities, model: ModelConfig) -> None:
    recipe = fp8_recipe(model)
    if recipe is None or model.fp8 is None:
        return
    if not available.gpu or not available.transformer_engine:
        missing = "Transformer Engine is not installed" if available.gpu else "there is no GPU"
        _refuse("model.fp8", model.fp8.value, f"null: {missing}")
    assert available.compute_capability is not None
    oldest, name = _FP8_NEEDS[recipe]
    if available.compute_capability < oldest:
        major, minor = available.compute_capability
        possible = [r.value for r, (needed, _) in _FP8_NEEDS.items() if available.compute_capability >= needed]
        allowed = ", ".join(possible) or "null with model.fp8=null"
        _refuse("model.fp8_recipe", recipe.value, f"{allowed}: it needs {name}, this GPU is {major}.{minor}")


def _batch_invariant_attention(available: Capabilities, layers: LayerSpec) -> int:
    """The generation of flash attention whose results do not depend on the batch, by this GPU's age.

    The second has no fixed number of splits; the third is written for Hopper, the fourth also for what came after it.
    """
    if layers is not LayerSpec.transformer_engine:
        _refuse("model.batch_invariant_mode", True, "false without Transformer Engine's layers on a GPU")
    assert available.compute_capability is not None
    on_hopper = available.compute_capability[0] == 9
    able = [n for n in available.flash_attention if n == 4 or (n == 3 and on_hopper)]
    if not able or available.compute_capability < (9, 0):
        name = "flash-attn-3 or flash-attn-4" if on_hopper else "flash-attn-4"
        _refuse("model.batch_invariant_mode", True, f"false without {name} on Hopper or newer")
    return able[0]


def _fusion(model: ModelConfig, name: str, *, possible: bool, needs: str) -> bool:
    wanted = model.transformer_config.get(name)
    if wanted and not possible:
        _refuse(f"model.transformer_config.{name}", True, f"false; true needs {needs}")
    return possible if wanted is None else bool(wanted)


def _refuse(key: str, given: object, allowed: str) -> None:
    raise ConfigError(f"{key}: given {given}, allowed: {allowed}")
