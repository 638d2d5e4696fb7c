"""Rotary frequencies: by hand, and equal to transformers'."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_rl.config.errors import UserError
from megatron_rl.models.build import inverse_frequencies
from megatron_rl.models.families.decoder import rope_parameters

LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_default_and_linear_by_hand():
    # theta 10000 and 4 channels: 10000^(-0/4) = 1 and 10000^(-2/4) = 0.01.
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    assert inverse_frequencies(4, rope).tolist() == pytest.approx([1.0, 0.01], rel=1e-6)
    scaled = inverse_frequencies(4, {**rope, "rope_type": "linear", "factor": 4.0})
    assert scaled.tolist() == pytest.approx([0.25, 0.0025], rel=1e-6)


def test_llama3_by_hand():
    """Three pairs of channels, whose frequencies 1, 1/100 and 1/10000 fall into the three cases.

    With 256 pi original positions they turn 128, 1.28 and 0.0128 times; the bounds are 0.5 and 2 turns. So the first is
    kept, the last is divided by 8, and the middle one is kept to (1.28 - 0.5) / (2 - 0.5) = 0.52:
    0.52 * 0.01 + 0.48 * 0.01 / 8 = 0.0058.
    """
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 256 * math.pi,
    }
    assert inverse_frequencies(6, rope).tolist() == pytest.approx([1.0, 0.0058, 1.25e-5], rel=1e-6)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 1e6}, LINEAR, LLAMA3], ids=lambda r: r["rope_type"]
)
def test_equal_to_transformers(head_dim, rope):
    config = LlamaConfig(head_dim=head_dim, num_attention_heads=2, hidden_size=2 * head_dim, rope_parameters=rope)
    if rope["rope_type"] == "default":
        expected = LlamaRotaryEmbedding(config).inv_freq
    else:
        expected, attention_scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        assert attention_scaling == 1.0
    # Two float32 evaluations of theta^x and a few products: some eps, 1.2e-7.
    torch.testing.assert_close(inverse_frequencies(head_dim, rope), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_parameters": LLAMA3, "rope_theta": LLAMA3["rope_theta"]}, LLAMA3),
    ],
)
def test_parameters_wherever_config_json_has_them(hf, expected):
    assert rope_parameters(hf) == expected


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic"},
            r"rope_type 'dynamic' in config\.json is not supported; allowed: default, linear, llama3",
        ),
        ({"rope_type": "linear"}, r"factor of the rope_type linear in config\.json: given None, allowed: a number"),
        ({**LLAMA3, "low_freq_factor": "1"}, r"low_freq_factor of the rope_type llama3 .* given 1, allowed: a number"),
    ],
)
def test_another_kind_and_a_missing_parameter_are_refused(rope, message):
    with pytest.raises(UserError, match=message):
        rope_parameters({"rope_parameters": rope})
