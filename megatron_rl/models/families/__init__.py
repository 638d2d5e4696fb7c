"""Model families: what differs between architectures, by the name that config.json gives.

    decoder      `Family`, and what all decoders share; start here
    experts      the feed-forward parts with experts
    llama        Llama, Mistral, Mixtral, Nemotron
    qwen         Qwen2, Qwen3, Qwen3-MoE
    deepseek     DeepSeek-V2 and V3
    gpt_oss      GPT-OSS

A new family is one new file that ends in its `FAMILIES`, and one line here; a relative of a known one is one more
entry in its file. Its name also stands in `config.hf_checkpoint`, which a test compares with this list.
"""

from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.families import deepseek, gpt_oss, llama, qwen
from megatron_rl.models.families.decoder import Family
from megatron_rl.models.model_config import resolved_config

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for module in (
        deepseek,
        gpt_oss,
        llama,
        qwen,
    )
    for family in module.FAMILIES
}


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
    family = FAMILIES[architecture]
    return Family(  # told what config.json means, not what it says
        architecture,
        lambda hf: family.transformer_fields(resolved_config(hf)),
        lambda hf: family.gpt_fields(resolved_config(hf)),
        lambda hf: family.tensor_maps(resolved_config(hf)),
    )


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
        raise UserError(f"{error.args[0]} is missing in config.json of {family.architecture}") from error
