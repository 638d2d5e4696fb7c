"""Divergences, several log-probs per position and argmax on one rank, against float64; sharded: tests/distributed."""

from typing import Any

import pytest
import torch

from megatron_rl.algorithms.supervised_loss import distillation_loss
from megatron_rl.parallel.vocab_parallel_divergences import (
    vocab_parallel_argmax,
    vocab_parallel_divergence,
    vocab_parallel_log_probs_of,
    with_tail,
)

DIRECTIONS = ("forward", "reverse", "jensen_shannon")
FLOAT32 = {"atol": 1e-6, "rtol": 1e-6}  # float32 has eps 1.2e-7; sums of 41 terms of about 0.1


def example(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(7, 48, generator=generator) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_gradient_agree_with_the_whole_distributions(direction: Any, dtype: Any) -> None:
    student, teacher = example(dtype)
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    p, q = ((x.double()[:, :41] / 0.7).log_softmax(1) for x in (exact, teacher))
    expected = distillation_loss(p, q, direction=direction, mixture=0.3)
    upstream = torch.linspace(-1, 2, 7)
    (expected * upstream).sum().backward()
    teacher[:, 41:] = float("nan")  # padding may hold anything
    found = vocab_parallel_divergence(
        student, teacher, group=None, vocab_size=41, direction=direction, mixture=0.3, temperature=0.7, chunk_tokens=3
    )
    (found * upstream).sum().backward()
    torch.testing.assert_close(found.double(), expected, **FLOAT32)
    half_eps = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(student.grad.double(), exact.grad, atol=1e-6, rtol=half_eps + 1e-6)
    assert not student.grad[:, 41:].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_models_do_not_diverge(direction: Any) -> None:
    student, _ = example()
    student.requires_grad_()
    found = vocab_parallel_divergence(student, student.detach(), group=None, vocab_size=48, direction=direction)
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.0] * 7, abs=1e-6)
    assert float(student.grad.abs().max()) < 1e-6


def test_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(q || p) = 1/4 log 1/2 + 3/4 log 3/2; KL(p || q) = 1/2 log 2 + 1/2 log 2/3.
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
    forward, reverse = (
        float(vocab_parallel_divergence(student, teacher, group=None, vocab_size=2, direction=d))
        for d in DIRECTIONS[:2]
    )
    assert forward == pytest.approx(0.25 * -0.6931472 + 0.75 * 0.4054651, abs=1e-6)
    assert reverse == pytest.approx(0.5 * 0.6931472 + 0.5 * -0.4054651, abs=1e-6)


def test_several_log_probs_and_their_mean() -> None:
    logits, _ = example()
    logits.requires_grad_()
    ids = torch.tensor([[0, 40, 7]] * 7)
    exact = logits.detach().double().requires_grad_()
    log_softmax = (exact[:, :41] / 0.7).log_softmax(1)
    weights = torch.linspace(-1, 1, 21).view(7, 3)
    (log_softmax.gather(1, ids) * weights).sum().add(0.3 * log_softmax.mean(1).sum()).backward()
    log_probs, mean = vocab_parallel_log_probs_of(
        logits, ids, group=None, vocab_size=41, temperature=0.7, chunk_tokens=3
    )
    ((log_probs * weights).sum() + 0.3 * mean.sum()).backward()
    torch.testing.assert_close(log_probs.double(), log_softmax.gather(1, ids), **FLOAT32)
    torch.testing.assert_close(mean.double(), log_softmax.mean(1), **FLOAT32)
    torch.testing.assert_close(logits.grad.double(), exact.grad, **FLOAT32)


@pytest.mark.parametrize("temperature", [0.3, 3.0])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits(temperature: float, offset: float) -> None:
    # Integers, which float32 holds exactly; divided by the temperature they are not.
    student = offset + torch.tensor([[0.0, 1.0, 2.0, -4.0], [0.0, -1e4, 1e4, 0.0]])
    teacher = offset + torch.tensor([[1.0, 1.0, 2.0, -3.0], [0.0, -1e4, 1e4, 9e3]])
    p, q = ((x.double() / temperature).log_softmax(1) for x in (student, teacher))
    place: Any = dict(group=None, vocab_size=4, temperature=temperature)
    for direction in DIRECTIONS:
        found = vocab_parallel_divergence(student, teacher, direction=direction, **place)
        expected = distillation_loss(p, q, direction=direction, mixture=0.5)
        torch.testing.assert_close(found.double(), expected, **FLOAT32)
    ids = torch.tensor([[3, 0], [1, 2]])
    log_probs, mean = vocab_parallel_log_probs_of(student, ids, **place)
    torch.testing.assert_close(log_probs.double(), p.gather(1, ids), **FLOAT32)
    torch.testing.assert_close(mean.double(), p.mean(1), **FLOAT32)
    assert (log_probs <= 0).all()


def test_the_tail_holds_the_rest() -> None:
    found = with_tail(torch.tensor([[0.5, 0.25]]).log())
    assert found.exp().tolist()[0] == pytest.approx([0.5, 0.25, 0.25])
    # Rounding may leave a sum above 1: the rest is then next to nothing, and finite.
    assert torch.isfinite(with_tail(torch.tensor([[0.0, -20.0]]))).all()


def test_argmax_takes_the_first_of_equal_ones_and_no_padding() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 9.0], [2.0, 0.0, 1.0, 9.0]])
    assert vocab_parallel_argmax(logits, group=None, vocab_size=3).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "sideways"}, "unknown direction 'sideways'"),
        ({"mixture": 1.0}, r"mixture is 1\.0; must be in"),
        ({"teacher": torch.zeros(6, 48)}, r"teacher \(6, 48\) must both be"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
    ],
)
def test_arguments_that_make_no_sense(change: Any, message: str) -> None:
    student, teacher = example()
    arguments: Any = dict(student=student, teacher=teacher, group=None, vocab_size=48, direction="forward") | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_divergence(**arguments)
