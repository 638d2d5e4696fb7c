"""The schedule of learning rate and weight decay, against Megatron's own where it has one."""

from typing import Any

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.config.schema import LRDecayStyle, OptimizerConfig
from megatron_rl.engine.optimizer import Schedule


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "wd_mult": 0.0}], lr=1.0)


def walk(scheduler: OptimizerParamScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return rates


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_is_that_of_cores_scheduler(style: str, warmup: int) -> None:
    config = OptimizerConfig(
        lr=0.5, min_lr=0.1, lr_decay_style=LRDecayStyle(style), lr_warmup_steps=warmup, lr_decay_steps=10
    )
    shared: dict[str, Any] = dict(start_wd=0.0, end_wd=0.0, wd_incr_steps=1, wd_incr_style="constant")
    core = OptimizerParamScheduler(
        optimizer(), 0.0, 0.5, 0.1, warmup, 10, style, **shared, use_checkpoint_opt_param_scheduler=False
    )
    assert walk(Schedule(optimizer(), config, num_steps=99), 14) == pytest.approx(walk(core, 14), rel=1e-14)


def test_an_exponential_decay_has_equal_ratios() -> None:
    config = OptimizerConfig(lr=8.0, min_lr=2.0, lr_decay_style=LRDecayStyle.exponential)
    rates = walk(Schedule(optimizer(), config, num_steps=4), 6)
    assert rates == pytest.approx([8 * 4 ** (-step / 4) for step in range(5)] + [2.0])


@pytest.mark.parametrize(
    ("end", "expected"),
    [(None, [0.1] * 6), (0.3, [0.1, 0.15, 0.2, 0.25, 0.3, 0.3]), (0.0, [0.1, 0.075, 0.05, 0.025, 0.0, 0.0])],
)
def test_weight_decay_goes_to_its_end_in_a_line(end: float | None, expected: list[float]) -> None:
    schedule = Schedule(optimizer(), OptimizerConfig(weight_decay=0.1, weight_decay_end=end), num_steps=4)
    found = []
    for _ in range(6):
        decayed, spared = schedule.optimizer.param_groups
        found.append(decayed["weight_decay"])
        assert spared["weight_decay"] == 0.0
        schedule.step(1)
    assert found == pytest.approx(expected)


def test_a_resumed_schedule_goes_on() -> None:
    config = OptimizerConfig(lr=1.0, lr_decay_style=LRDecayStyle.linear, weight_decay=0.1, weight_decay_end=0.0)
    first = Schedule(optimizer(), config, num_steps=10)
    walk(first, 4)
    second = Schedule(optimizer(), config, num_steps=10)
    second.load_state_dict(first.state_dict())
    for name in ("lr", "weight_decay"):
        assert second.optimizer.param_groups[0][name] == first.optimizer.param_groups[0][name]
    assert walk(second, 3) == walk(first, 3)
