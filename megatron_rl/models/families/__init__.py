"""Model families: one file each, registered here by the architecture that config.json names.

A family is a module with ARCHITECTURE, `transformer_fields(hf)`, `gpt_fields(hf)` and `tensor_maps(hf)`, where hf is
config.json as a dictionary.
"""

from typing import Any, Protocol

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import llama, qwen2, qwen3
from megatron_rl.models.tensor_map import TensorMap


class Family(Protocol):
    """What a family's module offers."""

    ARCHITECTURE: str

    def transformer_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig."""
        ...

    def gpt_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Arguments of Megatron's GPTModel."""
        ...

    def tensor_maps(self, hf: dict[str, Any]) -> list[TensorMap]:
        """The table of tensors, in the order of the layers."""
        ...


FAMILIES: dict[str, Family] = {family.ARCHITECTURE: family for family in (llama, qwen2, qwen3)}


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
    return FAMILIES[architecture]
