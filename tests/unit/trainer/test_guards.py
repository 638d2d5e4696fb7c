"""Guards trip on what is over their limit, and only then."""

import math

import pytest

from megatron_rl.config.schema import GuardAction, GuardConfig
from megatron_rl.trainer.update import tripped, unknown_metrics

ABOVE = GuardConfig("policy/approx_kl", above=0.5, action=GuardAction.stop)
SPIKE = GuardConfig("policy/loss", above_deviations=3.0, window=5, action=GuardAction.rollback)


@pytest.mark.parametrize(("value", "trips"), [(0.5, False), (0.500001, True), (math.nan, True), (-9.0, False)])
def test_a_fixed_limit(value: float, trips: bool) -> None:
    trip = tripped([ABOVE], {"policy/approx_kl": value}, {})
    assert (trip is not None) == trips
    if trip is not None:
        assert trip[0] is GuardAction.stop
        assert trip[1].startswith(f"policy/approx_kl is {value:.6g}, ")


def test_a_spike_is_measured_by_the_recent_past() -> None:
    past: dict[str, list[float]] = {}
    for value in (1.0, 3.0, 1.0, 3.0):
        assert tripped([SPIKE], {"policy/loss": value}, past) is None
        assert tripped([SPIKE], {"policy/loss": 100.0}, dict(past)) is None  # too little past to judge by
    assert tripped([SPIKE], {"policy/loss": 2.0}, past) is None
    # Mean 2, deviation sqrt(4/5) = 0.8944: the limit is 2 + 3 * 0.8944 = 4.6833.
    assert tripped([SPIKE], {"policy/loss": 4.68}, dict(past)) is None
    trip = tripped([SPIKE], {"policy/loss": 4.69}, past)
    assert trip == (
        GuardAction.rollback,
        "policy/loss is 4.69, above 4.68328, 3 deviations over the mean of 5 updates",
    )
    assert past == {"policy/loss": [1.0, 3.0, 1.0, 3.0, 2.0]}  # a spike is not part of what is usual
    tripped([SPIKE], {"policy/loss": 2.5}, past)
    assert past == {"policy/loss": [3.0, 1.0, 3.0, 2.0, 2.5]}


def test_a_flat_past_does_not_trip_on_rounding() -> None:
    past = {"policy/loss": [2.0] * 5}
    assert tripped([SPIKE], {"policy/loss": 2.05}, past) is None  # 2 + 3 * 0.01 * 2 = 2.06
    assert tripped([SPIKE], {"policy/loss": 2.07}, {"policy/loss": [2.0] * 5}) is not None


def test_the_first_guard_that_trips_decides_and_others_metrics_are_left_alone() -> None:
    skip = GuardConfig("policy/approx_kl", above=0.1, action=GuardAction.skip)
    trip = tripped([ABOVE, skip], {"policy/approx_kl": 0.3, "other": math.nan}, {})
    assert trip is not None
    assert trip[0] is GuardAction.skip
    assert tripped([ABOVE], {"other": math.nan}, {}) is None


def test_a_metric_that_no_update_has_is_named_with_the_nearest() -> None:
    guards = [GuardConfig(metric="sft/loss", above=1.0), GuardConfig(metric="sft/los", above=1.0)]
    line = unknown_metrics(guards, {"sft/loss": 0.5, "optim/grad_norm": 1.0})
    assert line is not None
    assert line.startswith("guards[1].metric: no update has 'sft/los'; did you mean 'sft/loss'?")
    assert unknown_metrics(guards[:1], {"sft/loss": 0.5}) is None
