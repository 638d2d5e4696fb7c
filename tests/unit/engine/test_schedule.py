"""What a configuration says of learning rate and weight decay is what the optimizer's groups get, step by step."""

import pytest
import torch

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.algorithms.schedules import DecayStyle, ramp, warmup_decay
from megatron_rl.config.schema import LRDecayStyle, OptimizerConfig, WeightDecayStyle
from megatron_rl.engine.optimizer import build_schedule


def groups_after(config: OptimizerConfig, num_steps: int) -> list[dict[str, float]]:
    """Learning rate and weight decay before each of `num_steps` steps, and after the last."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(config, optimizer, num_steps=num_steps)
    found = []
    for _ in range(num_steps + 1):
        found.append({name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay")})
        schedule.step(increment=1)
    return found


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "exponential"])
def test_learning_rates_are_those_of_the_formulas(style: DecayStyle) -> None:
    config = OptimizerConfig(lr=2.0, min_lr=0.5, lr_warmup_steps=2, lr_decay_style=LRDecayStyle(style))
    found = [group["lr"] for group in groups_after(config, 8)]
    formula = [warmup_decay(step, peak=2.0, end=0.5, warmup_steps=2, decay_steps=8, style=style) for step in range(9)]
    assert found == pytest.approx(formula)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_goes_to_its_end(style: DecayStyle) -> None:
    config = OptimizerConfig(
        weight_decay=0.1, end_weight_decay=0.5, weight_decay_incr_style=WeightDecayStyle(style), lr_decay_steps=4
    )
    found = [group["weight_decay"] for group in groups_after(config, 6)]
    formula = [ramp(min(step, 4), start=0.1, end=0.5, num_steps=4, style=style) for step in range(7)]
    assert found == pytest.approx(formula)
    assert found[0] != found[1] != found[2]


def test_without_an_end_it_stays() -> None:
    assert {group["weight_decay"] for group in groups_after(OptimizerConfig(weight_decay=0.1), 3)} == {0.1}
