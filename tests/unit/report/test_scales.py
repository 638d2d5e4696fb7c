import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.report.scales import (
    Series,
    bucket_slices,
    choose_scale,
    downsample,
    linear_scale,
    log_scale,
    nice_ticks,
    tick_labels,
)


def test_few_steps_are_drawn_as_they_are():
    series = Series("x", [1.0, None, math.nan])
    assert downsample([1, 5, 9], [series], 3) == ([1.0, 5.0, 9.0], [series])


def test_buckets_have_the_mean_the_extremes_and_the_middle_step():
    # Four steps into two buckets: (10, 20) and (30, 50).
    steps, (joined,) = downsample([10, 20, 30, 50], [Series("x", [1.0, 3.0, -4.0, 10.0])], 2)
    assert steps == [15.0, 40.0]
    assert (joined.values, joined.low, joined.high) == ([2.0, 3.0], [1.0, -4.0], [3.0, 10.0])


def test_the_band_of_a_bucket_contains_the_bands_of_its_steps():
    one = Series("x", [1.0, 3.0], low=[0.5, 2.0], high=[9.0, 4.0])
    _, (joined,) = downsample([1, 2], [one], 1)
    assert (joined.values, joined.low, joined.high) == ([2.0], [0.5], [9.0])


def test_missing_and_non_finite_numbers_do_not_enter_a_mean():
    _, (joined,) = downsample([1, 2, 3, 4, 5, 6], [Series("x", [1.0, math.inf, math.nan, None, None, None])], 3)
    assert joined.values[0] == 1.0
    assert math.isnan(joined.values[1])
    assert joined.values[2] is None


@given(st.integers(1, 5000), st.integers(1, 200))
def test_buckets_hold_every_step_once_and_are_of_equal_size_up_to_one(num_steps, max_points):
    buckets = bucket_slices(num_steps, max_points)
    assert [step for bucket in buckets for step in range(num_steps)[bucket]] == list(range(num_steps))
    sizes = {bucket.stop - bucket.start for bucket in buckets}
    assert len(buckets) == min(num_steps, max_points)
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=21, max_size=60))
def test_no_spike_is_hidden(values):
    _, (joined,) = downsample(list(range(len(values))), [Series("x", values)], 20)
    assert min(joined.low) == min(values)
    assert max(joined.high) == max(values)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0)),
        (0.03, 0.61, (0.0, 0.2, 0.4, 0.6, 0.8)),  # 0.58 / 4 = 0.145, so steps of 0.2
        (-3.0, 11.0, (-5.0, 0.0, 5.0, 10.0, 15.0)),  # 14 / 4 = 3.5, so 5
        (0.0, 8.0, (0.0, 2.0, 4.0, 6.0, 8.0)),  # 8 / 4 = 2 exactly
        (0.0, 40.0, (0.0, 10.0, 20.0, 30.0, 40.0)),  # 40 / 4 = 10 exactly: the first factor
    ],
)
def test_ticks_are_round_and_enclose_the_numbers(low, high, expected):
    assert nice_ticks(low, high, 4) == pytest.approx(expected, abs=1e-12)  # sums of 0.2 are not exact


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_any_range_has_a_few_ticks_around_it(low, width):
    ticks = nice_ticks(low, low + width, 4)
    # An end within a billionth of a step of a tick needs no further one; a tick itself is rounded to a float.
    slack = 1e-8 * (ticks[1] - ticks[0]) + math.ulp(max(abs(low), abs(low + width)))
    assert ticks[0] - slack <= low
    assert low + width <= ticks[-1] + slack
    # The spacing is at least a fourth of the range, so at most 4 + 2 ticks; at most 2.5 fourths, so at least 2.
    assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize(
    ("ticks", "unit", "expected"),
    [
        ((0.0, 0.25, 0.5), "number", ("0.00", "0.25", "0.50")),
        ((0.6000000000000001, 0.8), "number", ("0.6", "0.8")),
        ((-0.0, 0.5), "number", ("0.0", "0.5")),
        ((0.0, 1000.0, 2000.0), "number", ("0", "1,000", "2,000")),
        ((0.0, 5000.0, 10000.0), "number", ("0", "5k", "10k")),
        ((1.0e9, 1.25e9), "number", ("1.00G", "1.25G")),
        ((0.0, 2.5e-7, 5e-7), "number", ("0", "2.5·10⁻⁷", "5·10⁻⁷")),
        ((0.0, 0.002, 0.004), "percent", ("0.0%", "0.2%", "0.4%")),
        ((0.0, 0.5, 1.0), "percent", ("0%", "50%", "100%")),
        ((-0.02, 0.0, 0.02), "number", ("-0.02", "0.00", "0.02")),
    ],
)
def test_tick_labels(ticks, unit, expected):
    assert tick_labels(ticks, unit) == expected


def test_linear_scale_maps_its_ends_to_bottom_and_top():
    scale = linear_scale([1.0, 9.0], "number", from_zero=True)
    # 0 to 9 in fourths is 2.25, so steps of 2.5 up to 10.
    assert (scale(0.0), scale(5.0), scale(10.0)) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("value", [0.0, 1e-6, -3.0, 1e9])
@pytest.mark.parametrize("from_zero", [True, False])
def test_a_constant_is_a_line_inside_the_plot(value, from_zero):
    assert 0 <= linear_scale([value, value], "number", from_zero=from_zero)(value) <= 1


def test_log_scale_has_decades():
    scale = log_scale([2e-4, 0.5], "number")
    assert scale.labels == ("10⁻⁴", "10⁻³", "0.01", "0.1", "1")
    # 1e-2 is half-way from 1e-4 to 1; logarithms are rounded to about 1e-16.
    assert scale(1e-2) == pytest.approx(0.5, abs=1e-15)


def test_log_scale_within_a_decade_has_more_labels():
    assert log_scale([0.003, 0.008], "number").labels == ("10⁻³", "2·10⁻³", "5·10⁻³", "0.01")


@pytest.mark.parametrize(("lowest", "label"), [(0.0, "0"), (-1e-3, "≤ 0")])
def test_log_scale_puts_zero_on_a_labelled_line_below_all_positive_numbers(lowest, label):
    scale = log_scale([lowest, 1e-3, 1e-1], "number")
    assert scale.labels == (label, "10⁻³", "0.01", "0.1")
    assert scale(lowest) == 0.0
    assert scale(1e-3) == pytest.approx(1 / 3, abs=1e-15)  # one decade of three: rounding of logarithms


def test_the_scale_is_logarithmic_where_asked_for_and_possible_or_where_one_spike_flattens_the_rest():
    def is_log(numbers, kind):
        return choose_scale(numbers, "number", kind, from_zero=False).log

    assert is_log([1e-3, 1e-2], "log")
    assert not is_log([0.0, 0.0], "log"), "an exact match of rollout and training has no logarithm"
    assert is_log([1.0, 1.0, 51.0], "auto")
    assert not is_log([1.0, 1.0, 49.0], "auto")
    assert not is_log([0.0, 1.0, 1000.0], "auto")
    assert not is_log([1e-3, 1.0], "linear")
