"""Every number of the schema has a range, and intervals mean what they look like."""

import dataclasses
import typing
from collections.abc import Iterator

import pytest

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.ranges import RANGES, check_ranges, contains
from megatron_rl.config.schema import Config, RewardFunctionConfig


def numbers(node: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(node).items():
        kinds = set(typing.get_args(hint) or (hint,))
        if dataclasses.is_dataclass(hint):
            yield from numbers(typing.cast(type, hint), f"{prefix}{name}.")
        elif kinds & {int, float} and typing.get_origin(hint) is not dict:
            yield prefix + name


def test_every_number_has_a_range() -> None:
    assert set(numbers(Config, "")) == set(RANGES)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[1, inf)", [1, 10**9], [0, -1, float("inf")]),
        ("(0, 1]", [1e-9, 1], [0, 1.0001, float("nan")]),
        ("[0, 1)", [0, 0.999], [1, -1e-9]),
    ],
)
def test_contains(interval: str, inside: list[float], outside: list[float]) -> None:
    assert all(contains(interval, number) for number in inside)
    assert not any(contains(interval, number) for number in outside)


def test_the_key_the_value_and_the_range_are_named() -> None:
    config = Config()
    check_ranges(config)  # the defaults are allowed, null too
    config.optimizer.adam_beta2 = 1.0
    with pytest.raises(ConfigError) as caught:
        check_ranges(config)
    assert str(caught.value) == "optimizer.adam_beta2: given 1.0, allowed: [0, 1)"


def test_a_reward_weight_is_finite() -> None:
    config = Config()
    config.rewards.functions = [RewardFunctionConfig("a", -1.0), RewardFunctionConfig("b", float("nan"))]
    with pytest.raises(ConfigError, match=r"rewards.functions\[1\].weight: given nan"):
        check_ranges(config)


def test_limits_of_single_phases_are_positive() -> None:
    config = Config()
    config.watchdog.phase_limits = {"generate": 30.0, "train": 0.0}
    with pytest.raises(ConfigError, match=r"watchdog.phase_limits.train: given 0.0, allowed: \(0, inf\)"):
        check_ranges(config)
