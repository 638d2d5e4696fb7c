"""The log-prob head on CUDA: its Triton kernels against float64, and both fused heads in bfloat16 and float32.

With Triton installed and TRITON_INTERPRET=1 they run on a CPU too.
"""

import os
from typing import Any

import pytest
import torch

from megatron_rl.parallel import triton_kernels
from megatron_rl.parallel.vocab_parallel import vocab_parallel_log_probs
from tests.unit.parallel.linear_heads import HEADS, Example, reference, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = {"atol": 1e-6, "rtol": 1e-6}


def on_device(example: Example) -> Example:
    return Example(example.hidden.to(DEVICE), example.weight.to(DEVICE), example.labels.to(DEVICE), example.vocab_size)


def test_the_kernels_are_taken() -> None:
    assert triton_kernels.can_run(torch.zeros(1, 1, device=DEVICE))
    assert not triton_kernels.can_run(torch.zeros(1, 1, device=DEVICE, dtype=torch.float64))


@pytest.mark.parametrize("columns", [1, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_of_a_tile(columns: int, dtype: torch.dtype) -> None:
    """5000 columns are three blocks; rising logits move the running maximum in each."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(7, columns, generator=generator) + torch.linspace(-20, 20, columns)
    x = x.to(dtype).to(DEVICE)
    column = torch.tensor([0, columns - 1, -1, columns, columns // 2, 0, 0], device=DEVICE)
    out = torch.empty_like(x, dtype=torch.float32)
    found = triton_kernels.reduce_tile(x, column, temperature=0.7, entropy=True, out=out)
    exact = x.double()
    maximum = exact.amax(1)
    d = (exact - maximum[:, None]) / 0.7
    e = d.exp()
    owned = (column >= 0) & (column < columns)
    target = torch.where(owned, exact.gather(1, column.clamp(0, columns - 1)[:, None])[:, 0], -torch.inf)
    torch.testing.assert_close(found.double(), torch.stack([maximum, e.sum(1), target, (e * d).sum(1)]), **FLOAT32)
    torch.testing.assert_close(out.double(), e, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
def test_from_logits(dtype: torch.dtype, entropy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(9, 3000, generator=generator)).to(dtype).to(DEVICE).requires_grad_()
    labels = torch.randint(0, 2900, (9,), generator=generator).to(DEVICE)
    exact = logits.detach().double().requires_grad_()
    log_softmax = (exact[:, :2900] / 0.7).log_softmax(1)
    expected = log_softmax.gather(1, labels[:, None])[:, 0] - 0.3 * entropy * (log_softmax.exp() * log_softmax).sum(1)
    expected.sum().backward()
    log_probs, entropies = vocab_parallel_log_probs(
        logits, labels, group=None, vocab_size=2900, temperature=0.7, entropy=entropy
    )
    total = log_probs if entropies is None else log_probs + 0.3 * entropies
    total.sum().backward()
    torch.testing.assert_close(total.double(), expected, **FLOAT32)
    rtol = torch.finfo(dtype).eps / 2 + 1e-6
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=rtol)


@pytest.mark.parametrize("temperature", [0.3, 3.0])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits_and_rows_with_gaps(temperature: float, offset: float) -> None:
    """Integers, which float32 holds exactly. A matrix whose columns are not next to each other is not the kernels'."""
    logits = offset + torch.tensor([[0.0, 1.0, 2.0, -4.0], [0.0, -1e4, 1e4, 0.0]])
    labels = torch.tensor([3, 1])
    exact = logits.double().requires_grad_()
    log_softmax = (exact / temperature).log_softmax(1)
    expected = log_softmax.gather(1, labels[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(1)
    (expected[0] + expected[1]).sum().backward()
    for x in (logits.to(DEVICE), logits.t().contiguous().to(DEVICE).t()):
        assert triton_kernels.can_run(x) == x.is_contiguous()
        x = x.requires_grad_()
        found = vocab_parallel_log_probs(x, labels.to(DEVICE), group=None, vocab_size=4, temperature=temperature)
        torch.testing.assert_close(torch.stack(found).cpu().double(), torch.stack(expected), **FLOAT32)
        (found[0] + found[1]).sum().backward()
        torch.testing.assert_close(x.grad.cpu().double(), exact.grad, **FLOAT32)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [{}, {"chunk_tokens": 4, "chunk_columns": 16}])
def test_fused_heads(name: str, dtype: Any, tiles: Any) -> None:
    """bfloat16: values to float32's precision, since products keep their accumulators; gradients to the rounding of the
    logits' gradients, 2^-9 of each, of which sums of up to 48 make an error of a few times that."""
    example = Example.draw(dtype=dtype)
    expected = {key: value.to(DEVICE) for key, value in reference(example, 0.7).items()}
    main_grad = torch.zeros(example.weight.shape, device=DEVICE)
    found = run(HEADS[name], on_device(example), temperature=0.7, main_grad=main_grad, **tiles)
    for key in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(found[key].double(), expected[key], **FLOAT32)
    atol, rtol = (1e-6, 1e-6) if dtype == torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(found["hidden"].double(), expected["hidden"], atol=atol, rtol=rtol)
    torch.testing.assert_close(main_grad.double(), expected["weight"], atol=atol, rtol=rtol)


@pytest.mark.skipif(INTERPRETED, reason="an interpreter has no speed")
@pytest.mark.parametrize("name", HEADS)
def test_memory_does_not_grow_with_the_logits(name: str) -> None:
    """32k tokens x 32k columns of bfloat16 would be 2 GiB of logits; the heads' buffers are at most 1.1 GiB, and the
    gradient of 32k x 256 hidden states is 16 MiB."""
    example = on_device(Example.draw(32768, 256, 32768, 32768, dtype=torch.bfloat16))
    main_grad = torch.zeros(example.weight.shape, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = lambda log_probs, entropy, tokens: -log_probs  # noqa: E731
    run(HEADS[name], example, losses=losses, main_grad=main_grad)
    limit = 2**28 if name == "two_pass" else 2**30 + 2**28
    assert torch.cuda.max_memory_allocated() - before < limit
