"""The rotary parameters of a config.json, and which are supported. Without torch, so that a run can begin with it."""

from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.models.model_config import resolved_config, rotary_source

_PARAMETERS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
}
"""rope_type -> what its formula takes."""


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, wherever the version of transformers that wrote config.json put them.

    Raises:
        UserError: a rope_type that has no formula here, or lacks a parameter of its formula; two sources that differ.
    """
    hf = resolved_config(hf)
    rope = rotary_source(hf)
    rope.setdefault("rope_type", "default")
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
        if rope.get("attention_factor") is not None:
            raise UserError(
                f"rope_parameters in config.json: attention_factor {rope['attention_factor']} is not supported; "
                "allowed: absent, it then follows from factor"
            )
    kind = rope["rope_type"]
    if kind not in _PARAMETERS:
        raise UserError(f"rope_type '{kind}' in config.json is not supported; allowed: {', '.join(_PARAMETERS)}")
    for name in _PARAMETERS[kind]:
        if not isinstance(rope.get(name), int | float):
            raise UserError(f"{name} of the rope_type {kind} in config.json: given {rope.get(name)}, allowed: a number")
    return rope


def yarn_concentration(rope: dict[str, Any]) -> tuple[float | None, float | None]:
    """(mscale, mscale_all_dim) with which core multiplies YaRN's cosines and sines as transformers does.

    Both take m(mscale) / m(mscale_all_dim) if both are given, else m(1), with m(x) = 0.1 x ln(factor) + 1.
    Source: YaRN, arXiv:2309.00071, section 3.4; DeepSeek-V2, arXiv:2405.04434, for the quotient.
    """
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return (rope["mscale"], rope["mscale_all_dim"]) if both else (None, None)


def yarn_attributes(rope: dict[str, Any]) -> dict[str, Any]:
    """What core reads from a TransformerConfig for YaRN in ordinary attention; they are no fields of it."""
    mscale, mscale_all_dim = yarn_concentration(rope)
    return dict(
        yarn_rotary_scaling_factor=rope["factor"],
        yarn_original_max_position_embeddings=rope["original_max_position_embeddings"],
        yarn_beta_fast=rope.get("beta_fast") or 32,
        yarn_beta_slow=rope.get("beta_slow") or 1,
        yarn_mscale=mscale,
        yarn_mscale_all_dim=mscale_all_dim,
        yarn_correction_range_round_to_int=rope.get("truncate", True),
    )
