"""Rotary frequencies of a Hugging Face config.

Megatron's rotary embedding takes a base and has one scaling built in with fixed constants. Here the frequencies
follow the checkpoint's own parameters, and `build` puts them into the model. YaRN is core's own, given its parameters.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.errors import UserError


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, wherever the version of transformers that wrote config.json put them."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if hf.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", hf["partial_rotary_factor"])
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    return rope


def yarn_concentration(rope: dict[str, Any]) -> tuple[float | None, float | None]:
    """(mscale, mscale_all_dim) with which core multiplies YaRN's cosines and sines as transformers does.

    Both take m(mscale) / m(mscale_all_dim) if both are given, else m(1), with m(x) = 0.1 x ln(factor) + 1.
    Source: YaRN, arXiv:2309.00071, section 3.4; DeepSeek-V2, arXiv:2405.04434, for the quotient.

    Raises:
        UserError: the factor is given as a number of its own.
    """
    if rope.get("attention_factor") is not None:
        raise UserError(
            f"rope_parameters in config.json: attention_factor {rope['attention_factor']} is not supported; "
            "allowed: absent, it then follows from factor"
        )
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

    Raises:
        UserError: another rope_type.
    """
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / rope["factor"]
    raise UserError(f"rope_type '{kind}' in config.json is not supported; allowed: default, linear, llama3, yarn")
