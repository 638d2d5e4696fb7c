"""What happens to numbers before a chart is drawn of them: fewer points, and an axis with round ticks.

`downsample` joins neighbouring steps into buckets when there are more steps than the eye can tell apart. The line is
the mean of each bucket and the band reaches from its lowest to its highest value, so no spike is hidden. A `Scale` maps
values to the height of the plot, linearly or by their logarithm.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeGuard

Value = float | None
"""A number; nan where it was not finite; None where nothing was measured."""
Unit = Literal["number", "percent"]
ScaleKind = Literal["linear", "log", "auto"]


LETTERS = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}
"""Short forms of large numbers, the largest first."""


@dataclass(frozen=True)
class Series:
    """One curve. `values` belong to the steps of the chart, one each; a band around them is optional."""

    label: str
    values: Sequence[Value]
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None
    color: int = 0
    """Index of the palette."""
    faint: bool = False
    """Thin, for what accompanies the main curve."""


@dataclass(frozen=True)
class Scale:
    """From values to [0, 1], 0 at the bottom of the plot."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        # On a logarithmic axis zero and below lie on the bottom line, whose label says so.
        return (math.log10(max(value, self.low)) - math.log10(self.low)) / math.log10(self.high / self.low)


def is_number(value: Value) -> TypeGuard[float]:
    """Measured and finite."""
    return value is not None and math.isfinite(value)


def bucket_slices(num_steps: int, max_points: int) -> list[slice]:
    """Stretches of neighbouring steps, as equal as can be: one step each if there are at most `max_points`."""
    num_buckets = min(num_steps, max_points)
    edges = [index * num_steps // num_buckets for index in range(num_buckets + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]


def downsample(steps: Sequence[int], series: Sequence[Series], max_points: int) -> tuple[list[float], list[Series]]:
    """Join neighbouring steps so that at most `max_points` remain.

    Returns:
        The middle of each bucket's steps, and the series over them: `values` the mean of a bucket's finite numbers (nan
        if it has only others, None if it has none), `low` and `high` the extremes of values and bands in it. With few
        enough steps, everything as it was given.
    """
    if len(steps) <= max_points:
        return [float(step) for step in steps], list(series)
    buckets = bucket_slices(len(steps), max_points)
    middles = [(steps[bucket][0] + steps[bucket][-1]) / 2 for bucket in buckets]
    joined = []
    for one in series:
        low, high = one.low or one.values, one.high or one.values
        joined.append(
            replace(
                one,
                values=[
                    _join(one.values[bucket], lambda numbers: math.fsum(numbers) / len(numbers)) for bucket in buckets
                ],
                low=[_join(low[bucket], min) for bucket in buckets],
                high=[_join(high[bucket], max) for bucket in buckets],
            )
        )
    return middles, joined


def _join(values: Sequence[Value], rule: Callable[[list[float]], float]) -> Value:
    numbers = [value for value in values if is_number(value)]
    if numbers:
        return rule(numbers)
    return math.nan if any(value is not None for value in values) else None


def nice_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten, about `count` of them, that enclose [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    # 1e-9: a step that equals the rough one up to rounding is taken.
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def linear_scale(numbers: Sequence[float], unit: Unit, *, from_zero: bool) -> Scale:
    """Scale whose ends are ticks. Equal numbers get some room around them."""
    low, high = min(numbers), max(numbers)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    # A range of rounding errors is no range: a constant learning rate is one flat line.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) / 2 or 1.0
        low, high = (0.0 if from_zero and low == 0 else low - room), high + room
    ticks = nice_ticks(low, high, 4)
    return Scale(ticks[0], ticks[-1], ticks, tick_labels(ticks, unit))


def log_scale(numbers: Sequence[float], unit: Unit) -> Scale:
    """Scale of whole decades. If a number is 0 or less, one more decade below, whose end stands for all of those."""
    positive = [number for number in numbers if number > 0]
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    last = max(last, first + 1)
    below_zero = len(positive) < len(numbers)
    first -= below_zero
    if last - first == 1:
        ticks = tuple(factor * 10.0**first for factor in (1, 2, 5, 10))
    else:
        ticks = tuple(10.0**exponent for exponent in range(first, last + 1, math.ceil((last - first) / 5)))
    labels = [f"{100 * tick:.12g}%" if unit == "percent" else _power_label(tick) for tick in ticks]
    if below_zero:
        labels[0] = "≤ 0" if min(numbers) < 0 else "0"
    return Scale(10.0**first, 10.0**last, ticks, tuple(labels), log=True)


def choose_scale(numbers: Sequence[float], unit: Unit, kind: ScaleKind, *, from_zero: bool) -> Scale:
    """The scale asked for. 'auto' takes the logarithm where one spike would flatten the rest: 50 times the median."""
    positive = sorted(number for number in numbers if number > 0)
    spiky = len(positive) == len(numbers) and positive[-1] > 50 * positive[len(positive) // 2]
    if positive and (kind == "log" or (kind == "auto" and spiky)):
        return log_scale(numbers, unit)
    return linear_scale(numbers, unit, from_zero=from_zero)


def tick_labels(ticks: Sequence[float], unit: Unit) -> tuple[str, ...]:
    """Labels with as many digits as tell the ticks apart: '0.05', '1,500', '12.5k', '2.5·10⁻⁶', '40%'."""
    largest = max(abs(tick) for tick in ticks)
    if unit == "percent":
        factor, suffix = 100.0, "%"
    else:
        # From 10,000 on: '1,500' is as short as '1.5k'.
        size = next((size for size in LETTERS if largest >= max(size, 1e4)), 1.0)
        factor, suffix = 1 / size, LETTERS.get(size, "")
    spacing = (ticks[1] - ticks[0]) * factor
    rounded = [round(tick / (ticks[1] - ticks[0])) * spacing for tick in ticks]
    if largest * factor < 1e-3:
        return tuple(_power_label(tick) if tick else "0" for tick in rounded)
    # Nice spacings have two digits at most, so some number of decimals writes them exactly.
    decimals = next(d for d in range(12) if math.isclose(round(spacing, d), spacing, rel_tol=1e-6))
    return tuple(
        f"{tick:,.{decimals}f}{suffix}" if tick else f"{0:.{decimals}f}{suffix.strip('TGMk')}" for tick in rounded
    )


def _power_label(value: float) -> str:
    """'0.1', '20', '10⁻⁵', '2.5·10⁻⁵'."""
    if 0.01 <= value <= 1000:
        return f"{value:.12g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = f"{float(mantissa):g}"
    return power if factor == "1" else f"{factor}·{power}"
