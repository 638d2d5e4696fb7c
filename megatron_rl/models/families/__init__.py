"""Model families: one file each, registered here by the architecture that config.json names.

A family is a module with ARCHITECTURE, `transformer_fields(hf)`, `gpt_fields(hf)` and `tensor_maps(hf)`, where hf is
config.json as a dictionary.
"""

from typing import Any, Protocol

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    nemotron,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_rl.models.model_config import resolved_config
from megatron_rl.models.tensor_map import TensorMap


class Family(Protocol):
    """What a family's module offers."""

    ARCHITECTURE: str

    def transformer_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig; `activation_func` by the name that `build` gives it."""
        ...

    def gpt_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Arguments of Megatron's GPTModel."""
        ...

    def tensor_maps(self, hf: dict[str, Any]) -> list[TensorMap]:
        """The table of tensors, in the order of the layers."""
        ...


_MODULES: tuple[Family, ...] = (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    nemotron,
    qwen2,
    qwen3,
    qwen3_moe,
)
FAMILIES: dict[str, Family] = {family.ARCHITECTURE: family for family in _MODULES}


def family_of(hf: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        UserError: the architecture is not known; the known ones are listed.
    """
    architecture = (hf.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise UserError(
            f"architecture '{architecture}' in config.json is not supported; allowed: {', '.join(sorted(FAMILIES))}"
        )
    return _Resolving(FAMILIES[architecture])


class _Resolving:
    """A family that is told what config.json means, not what it says; see `model_config`."""

    def __init__(self, family: Family) -> None:
        self._family, self.ARCHITECTURE = family, family.ARCHITECTURE

    def transformer_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        return self._family.transformer_fields(resolved_config(hf))

    def gpt_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        return self._family.gpt_fields(resolved_config(hf))

    def tensor_maps(self, hf: dict[str, Any]) -> list[TensorMap]:
        return self._family.tensor_maps(resolved_config(hf))


def check_family(hf: dict[str, Any]) -> None:
    """Check all of a config.json that its family reads. No tensor is made, and torch is not imported.

    Raises:
        UserError: the architecture, or an option of it, is not supported; a field is missing or cannot be.
    """
    family = family_of(hf)
    try:
        family.transformer_fields(hf)
        family.gpt_fields(hf)
        family.tensor_maps(hf)
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing in config.json of {family.ARCHITECTURE}") from error
