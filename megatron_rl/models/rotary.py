"""Rotary frequencies of a Hugging Face config.

Megatron's rotary embedding takes a base and has one scaling built in with fixed constants. Here the frequencies
follow the checkpoint's own parameters, and `build` puts them into the model.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.errors import UserError


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, wherever the version of transformers that wrote config.json put them."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


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
    raise UserError(f"rope_type '{kind}' in config.json is not supported; allowed: default, linear, llama3")
