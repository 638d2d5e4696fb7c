"""Schedules by hand, and what decoupled weight decay is not."""

import math
from typing import Any

import pytest
import torch

from megatron_rl.algorithms.schedules import DecayStyle, ramp, warmup_decay

RUN: dict[str, Any] = dict(peak=8.0, end=2.0, warmup_steps=4, decay_steps=12)


@pytest.mark.parametrize(
    ("style", "expected"),
    # steps 0, 2, 4 (the peak), 6 (a quarter of the decay), 8 (half), 12, 20 (after the end)
    [
        ("constant", [0, 4, 8, 8, 8, 8, 8]),
        ("linear", [0, 4, 8, 6.5, 5, 2, 2]),
        ("cosine", [0, 4, 8, 2 + 3 * (1 + math.cos(math.pi / 4)), 5, 2, 2]),
        ("exponential", [0, 4, 8, 8 * 0.25**0.25, 4, 2, 2]),
    ],
)
def test_by_hand(style: DecayStyle, expected: list[float]) -> None:
    got = [warmup_decay(step, style=style, **RUN) for step in (0, 2, 4, 6, 8, 12, 20)]
    assert got == pytest.approx(expected, rel=1e-12)


def test_the_quarter_wave_is_another_schedule() -> None:
    # cos(pi t / 2T) is printed as the cosine schedule: halfway it is 0.707, and its slope is steepest at its end.
    half = warmup_decay(5, peak=1.0, end=0.0, warmup_steps=0, decay_steps=10, style="cosine")
    assert half == pytest.approx(0.5)
    assert math.cos(math.pi * 5 / 20) == pytest.approx(0.7071, abs=1e-4)


def test_without_warmup_the_first_step_is_the_peak() -> None:
    assert warmup_decay(0, peak=3.0, end=1.0, warmup_steps=0, decay_steps=5, style="linear") == 3.0


def test_ramps_go_either_way() -> None:
    def at(step: float, style: DecayStyle) -> float:
        return ramp(step, start=0.1, end=0.4, num_steps=10, style=style)

    assert [at(0, "linear"), at(5, "linear"), at(10, "linear"), at(99, "linear")] == pytest.approx(
        [0.1, 0.25, 0.4, 0.4]
    )
    assert at(5, "cosine") == pytest.approx(0.25)
    assert at(5, "exponential") == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"a constant cannot go from 0\.1 to 0\.4"):
        at(5, "constant")


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match="decay_steps is 4; must be more than warmup_steps = 4"):
        warmup_decay(0, peak=1.0, end=0.0, warmup_steps=4, decay_steps=4, style="linear")
    with pytest.raises(ValueError, match="an exponential decay needs peak and end > 0"):
        warmup_decay(0, peak=1.0, end=0.0, warmup_steps=0, decay_steps=4, style="exponential")
    with pytest.raises(ValueError, match="unknown style 'sine'; one of"):
        warmup_decay(5, peak=1.0, end=0.0, warmup_steps=4, decay_steps=9, style="sine")  # type: ignore[arg-type]


def test_weight_decay_is_not_a_penalty_in_the_loss() -> None:
    # One step of Adam from theta = 1 without any other gradient. Decoupled: 1 - lr lambda = 0.9. As lambda theta^2 in
    # the loss it is a gradient, which Adam scales to 1: 1 - lr = 0.
    def step(optimizer: type[torch.optim.Optimizer], decay: float, penalty: float) -> float:
        theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
        (penalty * theta.square().sum()).backward()
        optimizer([theta], lr=1.0, weight_decay=decay).step()  # type: ignore[call-arg]
        return float(theta.detach())

    assert step(torch.optim.AdamW, 0.1, 0.0) == pytest.approx(0.9)
    assert step(torch.optim.Adam, 0.0, 0.1) == pytest.approx(0.0, abs=1e-6)
