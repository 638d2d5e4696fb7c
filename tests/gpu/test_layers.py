"""The policy's layers on a GPU against transformers in float32: portable, Transformer Engine's, FP8.

bfloat16 has 8 bits of mantissa: log-probs of these models, of the order of 10 nats, move by some hundredths. FP8 has 4:
by some tenths. The means are compared, and FP8 must show, or it did not run.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config.schema import Dtype, Fp8Format, Fp8Recipe, LayerSpec
from tests.gpu.conftest import needs
from tests.gpu.policies import SEQUENCES, build, log_probs

BF16_MEAN, FP8_MEAN = 0.03, 0.5


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    parts = []
    with torch.no_grad():
        for sequence in SEQUENCES:
            ids = torch.tensor([sequence])
            values = model(ids).logits[0, :-1].log_softmax(-1)
            parts.append(values.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(parts)


def mean_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().mean())


def test_portable_layers_in_float32(checkpoint: Path, groups: Any, expected: torch.Tensor) -> None:
    policy = build(checkpoint, groups, Dtype.float32, layer_spec=LayerSpec.portable)
    # Products of float32 may run as tf32 nowhere: torch's default forbids it.
    torch.testing.assert_close(log_probs(policy), expected, rtol=0, atol=1e-4)


def test_portable_layers_in_bfloat16(checkpoint: Path, groups: Any, expected: torch.Tensor) -> None:
    assert mean_error(log_probs(build(checkpoint, groups, layer_spec=LayerSpec.portable)), expected) < BF16_MEAN


@needs("transformer_engine")
def test_transformer_engines_layers_in_bfloat16(checkpoint: Path, groups: Any, expected: torch.Tensor) -> None:
    policy = build(checkpoint, groups, layer_spec=LayerSpec.transformer_engine)
    assert mean_error(log_probs(policy), expected) < BF16_MEAN


@needs("transformer_engine")
@pytest.mark.parametrize("recipe", [Fp8Recipe.delayed, Fp8Recipe.tensorwise, Fp8Recipe.blockwise])
def test_fp8_layers(recipe: Fp8Recipe, checkpoint: Path, groups: Any, expected: torch.Tensor) -> None:
    policy = build(checkpoint, groups, fp8=Fp8Format.e4m3, fp8_recipe=recipe)
    error = mean_error(log_probs(policy, multiple=16), expected)
    assert BF16_MEAN < error < FP8_MEAN


@needs("transformer_engine")
def test_fp8_parameters_are_loaded_and_exported(checkpoint: Path, groups: Any, expected: torch.Tensor) -> None:
    from megatron.core.fp8_utils import is_float8tensor
    from safetensors.torch import load_file

    policy = build(checkpoint, groups, fp8=Fp8Format.e4m3, fp8_recipe=Fp8Recipe.tensorwise, fp8_param=True)
    assert any(is_float8tensor(parameter) for parameter in policy.parameters.values())
    assert mean_error(log_probs(policy, multiple=16), expected) < FP8_MEAN
    stored = load_file(checkpoint / "model.safetensors")
    for name, tensor in policy.hf_tensors(bucket_bytes=1 << 20):
        weight = stored[name]
        # E4M3 rounds by at most 1/16 of a value, and below 2^-6 / 448 of the largest by at most 2^-10 / 448 of it.
        bound = weight.abs() / 16 + weight.abs().amax() * 2**-9 / 448 * 2
        assert bool(((tensor.float().cpu() - weight).abs() <= bound).all()), name
