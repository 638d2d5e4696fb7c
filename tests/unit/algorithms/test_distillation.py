"""Divergences from a teacher by hand, and the policy gradient that equals one of them."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.kl import adaptive_kl_coefficient, exact_kl, kl_estimate
from megatron_rl.algorithms.policy_loss import reinforce_loss
from megatron_rl.algorithms.supervised_loss import distillation_advantages, distillation_loss

LN = math.log
STUDENT = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()


def test_by_hand() -> None:
    # Position 0: reverse (ln 2 + ln 2/3) / 2, forward ln(1/2) / 4 + 3 ln(3/2) / 4; position 1 agrees.
    reverse = distillation_loss(STUDENT, TEACHER, direction="reverse", mixture=0.5)
    forward = distillation_loss(STUDENT, TEACHER, direction="forward", mixture=0.5)
    assert reverse.tolist() == pytest.approx([(LN(2) + LN(2 / 3)) / 2, 0.0], abs=1e-15)
    assert forward.tolist() == pytest.approx([LN(0.5) / 4 + 3 * LN(1.5) / 4, 0.0], abs=1e-15)
    # M = (0.375, 0.625)
    middle = distillation_loss(STUDENT, TEACHER, direction="jensen_shannon", mixture=0.5)
    teacher = 0.25 * LN(0.25 / 0.375) + 0.75 * LN(0.75 / 0.625)
    student = 0.5 * LN(0.5 / 0.375) + 0.5 * LN(0.5 / 0.625)
    assert middle.tolist() == pytest.approx([(teacher + student) / 2, 0.0], abs=1e-15)


def test_the_mixture_ends_at_the_two_kl() -> None:
    for mixture, scale, direction in ((1e-6, 1e-6, "forward"), (1 - 1e-6, 1e-6, "reverse")):
        got = distillation_loss(STUDENT, TEACHER, direction="jensen_shannon", mixture=mixture) / scale
        expected = distillation_loss(STUDENT, TEACHER, direction=direction, mixture=0.5)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", ["reverse", "forward", "jensen_shannon"])
def test_gradient_agrees_with_finite_differences(direction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return distillation_loss(x.log_softmax(1), teacher.log_softmax(1), direction=direction, mixture=0.3)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


def test_the_advantages_give_the_gradient_of_the_reverse_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    teacher = teacher.log_softmax(0)
    logits.requires_grad_()
    log_probs = logits.log_softmax(0)
    # Every token as often as the student samples it.
    losses = reinforce_loss(log_probs, distillation_advantages(log_probs, teacher))
    (sampled,) = torch.autograd.grad((log_probs.exp().detach() * losses).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad(exact_kl(log_probs, teacher), logits)
    torch.testing.assert_close(sampled, exact, atol=1e-7, rtol=0)  # advantages are rounded to float32


def test_exact_kl_of_impossible_tokens_and_of_garbage() -> None:
    log_p = torch.tensor([[0.0, -math.inf], [LN(0.5), LN(0.5)], [math.nan, 0.0]], requires_grad=True)
    log_q = torch.tensor([[LN(0.5), LN(0.5)], [0.0, -math.inf], [0.0, 0.0]])
    got = exact_kl(log_p, log_q)
    assert got[:2].tolist() == pytest.approx([LN(2), math.inf])
    assert got[2].isnan()
    got.sum().backward()
    assert log_p.grad is not None
    assert torch.isfinite(log_p.grad).all()
    assert not log_p.grad[1:].any()


def test_the_printed_example_of_k1_and_k3() -> None:
    policy, reference = torch.tensor([-1.2, -2.5, -0.8, -0.3]), torch.tensor([-1.3, -2.0, -0.9, -1.5])
    assert float(kl_estimate(policy, reference, "k1").sum()) == pytest.approx(0.9, abs=1e-6)
    # exp(-d) - 1 + d: 0.0048374, 0.1487213, 0.0048374, 0.5011942. It is printed as 0.657, from (0.005, 0.132, 0.005,
    # 0.515); and (r - 1) - log r with r = policy / reference, the formula beside it, sums to 1.2369894.
    right = float(kl_estimate(policy, reference, "k3").sum())
    assert right == pytest.approx(0.6595903, abs=1e-6)
    ratio = (policy - reference).exp()
    assert float((ratio - 1 - ratio.log()).sum()) == pytest.approx(1.2369894, abs=1e-6)
    assert abs(right - 0.657) > 0.002


def test_the_kl_controller_by_hand() -> None:
    def after(kl: float) -> float:
        return adaptive_kl_coefficient(0.1, kl, target=2.0, horizon=100.0, num_samples=50)

    assert after(2.0) == pytest.approx(0.1)
    assert after(2.2) == pytest.approx(0.105)  # 10 % above the target, half the horizon: 5 %
    assert after(20.0) == pytest.approx(0.11)  # bounded by 20 %
    assert after(0.0) == pytest.approx(0.09)
    assert after(math.nan) == 0.1
    with pytest.raises(ValueError, match=r"target is 0\.0, must be > 0"):
        adaptive_kl_coefficient(0.1, 1.0, target=0.0, horizon=100.0, num_samples=50)


def test_the_controller_finds_the_coefficient_that_keeps_the_target() -> None:
    # A policy whose KL falls with the coefficient, kl = 0.4 / beta: the target 2 is kept at beta = 0.2.
    beta = 5.0
    for _ in range(300):
        beta = adaptive_kl_coefficient(beta, 0.4 / beta, target=2.0, horizon=100.0, num_samples=20)
    assert beta == pytest.approx(0.2, rel=1e-3)


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown direction 'mixed'; one of 'reverse', 'forward', 'jensen_shannon'"):
        distillation_loss(STUDENT, TEACHER, direction="mixed", mixture=0.5)
    with pytest.raises(ValueError, match=r"mixture is 1\.0; must be in \(0, 1\)"):
        distillation_loss(STUDENT, TEACHER, direction="jensen_shannon", mixture=1.0)
