"""Log-probs under top-k and top-p on one rank, against sorting in float64; sharded: tests/distributed."""

import math
from typing import Any

import pytest
import torch

from megatron_rl.parallel import filtered_log_probs as module
from megatron_rl.parallel.filtered_log_probs import filtered_log_probs

FLOAT32 = {"atol": 1e-6, "rtol": 1e-6}
FILTERS = [(None, 1.0), (5, 1.0), (1, 1.0), (None, 0.8), (None, 0.05), (7, 0.6), (1000, 0.999)]


def sorting(logits: Any, labels: Any, vocab_size: int, temperature: float, top_k: int | None, top_p: float) -> Any:
    """The rule by sorting each row: what vLLM's sampler keeps, and the label."""
    z = logits.double()[:, :vocab_size] / temperature
    kept = torch.zeros_like(z, dtype=torch.bool)
    for row in range(len(z)):
        order = z[row].detach().argsort(descending=True)[:top_k]
        probabilities = z[row].detach()[order].softmax(0)
        before = probabilities.cumsum(0) - probabilities
        kept[row, order[before < top_p]] = True
        kept[row, labels[row]] = True
    return torch.where(kept, z, -math.inf).log_softmax(1).gather(1, labels[:, None])[:, 0]


def example() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(9, 48, generator=generator)
    return logits, torch.randint(0, 41, (9,), generator=generator)


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_agree_with_sorting(top_k: Any, top_p: float, dtype: Any) -> None:
    logits, labels = example()
    logits = logits.to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    expected = sorting(exact, labels, 41, 0.7, top_k, top_p)
    upstream = torch.linspace(-1, 2, 9)
    (expected * upstream).sum().backward()
    found = filtered_log_probs(
        logits, labels, group=None, vocab_size=41, temperature=0.7, top_k=top_k, top_p=top_p, chunk_tokens=4
    )
    (found * upstream).sum().backward()
    torch.testing.assert_close(found.double(), expected, **FLOAT32)
    assert (found <= 0).all()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=2e-6, rtol=torch.finfo(dtype).eps / 2 + 2e-6)


def test_by_hand() -> None:
    # p = 4/8, 2/8, 1/8, 1/8.
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()

    def of(label: int, **filters: Any) -> float:
        return math.exp(float(filtered_log_probs(logits, torch.tensor([label]), group=None, vocab_size=4, **filters)))

    assert of(0) == pytest.approx(4 / 8)
    assert of(1, top_k=2) == pytest.approx(2 / 6)
    assert of(1, top_p=0.7) == pytest.approx(2 / 6)  # 4/8 are not enough, 6/8 are
    assert of(0, top_p=0.4) == 1.0
    # Not kept by the filter, but sampled: 4 + 1.
    assert of(3, top_k=1) == pytest.approx(1 / 5)
    # Of equal logits both are kept.
    assert of(2, top_k=3) == pytest.approx(1 / 8)


def test_keys_have_the_order_of_the_numbers() -> None:
    numbers = torch.tensor([-math.inf, -3e38, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.5, 3e38, math.inf])
    keys = module._ordered(numbers)
    assert keys[4] == keys[5]
    assert (keys.diff() >= 0).all()
    assert (keys.diff() == 0).nonzero().tolist() == [[4]]
    assert keys.min() >= 0
    assert keys.max() < 2**32


@pytest.mark.parametrize("bug", ["label dropped", "one digit short"])
def test_planted_bugs_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "label dropped":
        monkeypatch.setattr(module, "_kept", lambda keys, threshold, column: keys >= threshold[:, None])
    else:
        real = module._threshold
        monkeypatch.setattr(module, "_threshold", lambda *a: real(*a) & ~0xFFFFFF)
    logits, labels = example()
    found = filtered_log_probs(logits, labels, group=None, vocab_size=41, top_k=3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found.double(), sorting(logits, labels, 41, 1.0, 3, 1.0), **FLOAT32)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"top_k": 0}, "top_k is 0"), ({"top_p": 0.0}, r"top_p is 0\.0"), ({"top_p": 1.5}, r"top_p is 1\.5")],
)
def test_arguments_that_make_no_sense(change: Any, message: str) -> None:
    logits, labels = example()
    with pytest.raises(ValueError, match=message):
        filtered_log_probs(logits, labels, group=None, vocab_size=41, **change)
