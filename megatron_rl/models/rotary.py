"""Rotary frequencies of a Hugging Face config.

Megatron's rotary embedding takes a base and has one scaling built in with fixed constants. Here the frequencies
follow the checkpoint's own parameters, and `build` puts them into the model. YaRN is core's own, given its parameters.
"""

import math
from typing import Any

import torch
from torch import Tensor


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
    """
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    assert kind == "llama3", f"{kind} has no frequencies of its own"
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope["factor"]
