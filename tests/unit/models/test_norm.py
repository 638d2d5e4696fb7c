"""The portable norm against its formula in float64, values and gradients."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_rl.models.layers import PortableNorm

EPS = 1e-2  # large enough to be seen


def make_norm(normalization: str, dtype: torch.dtype, sequence_parallel: bool = False) -> PortableNorm:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization=normalization,
        params_dtype=dtype,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
    )
    norm = PortableNorm(config, 8, eps=EPS)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.linspace(-0.5, 0.5, 8))
    return norm


def formula(x, weight, bias):
    """RMSNorm: x / sqrt(mean x^2 + eps) * w.  LayerNorm: (x - mean) / sqrt(var + eps) * w + b, var biased."""
    if bias is None:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_formula(normalization, dtype):
    norm = make_norm(normalization, dtype)
    x = (torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)) + 1).to(dtype).requires_grad_()
    upstream = torch.linspace(-1, 1, 48).view(3, 2, 8).to(dtype)
    out = norm(x)
    out.backward(upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *norm.parameters())]
    expected = formula(*exact, None) if len(exact) == 2 else formula(*exact)
    expected.backward(upstream.double())
    # float32: a handful of roundings of eps 1.2e-7 on sums of at most 48 terms of size 1. bfloat16: the result is
    # rounded once, to half of eps 7.8e-3 of values of up to about 4; the same for gradients, of up to 12.
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (4e-3, 4e-2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.detach().double(), expected.detach(), rtol=rtol, atol=atol)
    for tensor, reference in zip((x, *norm.parameters()), exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=rtol, atol=atol)


def test_parameters_say_that_their_gradient_is_partial_under_sequence_parallelism():
    """Core sums the gradients of parameters so marked over the tensor-parallel ranks; see finalize_model_grads."""
    assert [p.sequence_parallel for p in make_norm("LayerNorm", torch.float32, True).parameters()] == [True, True]
    assert [p.sequence_parallel for p in make_norm("RMSNorm", torch.float32).parameters()] == [False]
