"""Charts as inline SVG, drawn in Python: what the report needs and no more.

Colours are CSS classes (`c0`, `c1`, ...), so that the page decides them, for light and dark. The numbers of a chart are
in its `data-points` attribute for the page's script, which shows them under the pointer; see `page`.

Coordinates are in the drawing's own units, x to the right and y down, as SVG has them.
"""

import json
from collections.abc import Sequence
from html import escape

from megatron_rl.report.scales import (
    Scale,
    ScaleKind,
    Series,
    Unit,
    Value,
    bucket_slices,
    choose_scale,
    downsample,
    is_number,
    linear_scale,
    nice_ticks,
    tick_labels,
)

WIDTH, HEIGHT = 440, 220
"""Size of the drawing; the page scales it."""
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 8, 24
"""Room around the plot for tick labels."""
MAX_POINTS = 160
"""Points of a curve: more would be less than 2.5 units apart."""
MAX_BARS = 80
"""Bars of a stack."""
MAX_MARKERS = 24
"""Curves with at most this many points show each as a dot."""


def line_chart(
    title: str,
    steps: Sequence[int],
    series: Sequence[Series],
    *,
    unit: Unit = "number",
    unit_name: str = "",
    scale: ScaleKind = "linear",
    from_zero: bool = False,
) -> str:
    """Curves over steps, as an HTML figure.

    Args:
        title: what is measured.
        steps: ascending; at least one.
        series: the curves; together they have at least one finite number.
        unit: how numbers are written; "percent" shows a fraction times 100.
        unit_name: written after the title.
        scale: of the values; see `scales.choose_scale`.
        from_zero: a linear scale includes 0.
    """
    middles, drawn = downsample(steps, series, MAX_POINTS)
    everything = [row for one in drawn for row in (one.values, one.low or (), one.high or ())]
    y = choose_scale(
        [value for row in everything for value in row if is_number(value)], unit, scale, from_zero=from_zero
    )
    xs = [_x_position(steps, middle) for middle in middles]
    parts = [_axes(y, [(_x_position(steps, tick), label) for tick, label in _step_ticks(steps)])]
    parts += [_band(xs, one, y) for one in drawn if one.low is not None and one.high is not None]
    parts += [_curve(xs, one, y) for one in drawn]
    parts += [_non_finite_marks(xs, one) for one in series]
    note = f"{unit_name}, log scale" if y.log and unit_name else "log scale" if y.log else unit_name
    return _figure(
        title, note, [(one.label, one.color) for one in series], parts, _hover_points(xs, steps, drawn, unit)
    )


def stacked_bars(title: str, steps: Sequence[int], series: Sequence[Series], *, unit_name: str = "") -> str:
    """Parts of a whole over steps, one bar a step (the mean of a few steps, if there are many), as an HTML figure.

    The legend says each part's share of the sum over all steps. A missing or non-finite value counts as 0.
    """
    middles, drawn = downsample(steps, series, MAX_BARS)
    heights = [[value if is_number(value) else 0.0 for value in one.values] for one in drawn]
    y = linear_scale([sum(bar) for bar in zip(*heights, strict=True)], "number", from_zero=True)
    pitch = (WIDTH - LEFT - RIGHT) / len(middles)
    bar_width = min(pitch * 0.82, 36.0)
    xs = [LEFT + pitch * (index + 0.5) for index in range(len(middles))]
    parts = [_axes(y, _bar_ticks(xs, middles, steps))]
    bottoms = [0.0] * len(middles)
    for one, values in zip(drawn, heights, strict=True):
        tops = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
        bars = zip(xs, bottoms, tops, strict=True)
        path = "".join(
            f"M{x - bar_width / 2:.1f} {_y(y, bottom):.1f}h{bar_width:.1f}V{_y(y, top):.1f}h{-bar_width:.1f}z"
            for x, bottom, top in bars
            if top > bottom
        )
        parts.append(f'<path class="bar c{one.color}" d="{path}"/>')
        bottoms = tops
    totals = [sum(value for value in one.values if is_number(value)) for one in series]
    whole = sum(totals) or 1.0
    legend = [(f"{s.label} {100 * total / whole:.0f}%", s.color) for s, total in zip(series, totals, strict=True)]
    return _figure(title, unit_name, legend, parts, _hover_points(xs, steps, drawn, "number"))


def _figure(title: str, note: str, legend: list[tuple[str, int]], parts: list[str], hover_points: str) -> str:
    keys = "".join(f'<span class="key c{color}">{escape(label)}</span>' for label, color in legend if label)
    note_html = f' <span class="unit">{escape(note)}</span>' if note else ""
    return (
        f'<figure class="chart" data-points="{escape(hover_points)}">'
        f"<figcaption><h3>{escape(title)}{note_html}</h3>"
        f'<div class="legend">{keys}</div></figcaption>'
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        '<div class="tip" hidden></div></div></figure>'
    )


def _y(scale: Scale, value: float) -> float:
    return HEIGHT - BOTTOM - scale(value) * (HEIGHT - TOP - BOTTOM)


def _x_position(steps: Sequence[int], at: float) -> float:
    """Place of a step on the axis, which reaches from the first step to the last; a single one is in the middle."""
    part = (at - steps[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else 0.5
    return LEFT + part * (WIDTH - LEFT - RIGHT)


def _axes(y: Scale, x_ticks: list[tuple[float, str]]) -> str:
    """Horizontal grid lines with labels, and labels of steps below."""
    lines = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(y, tick):.1f}" y2="{_y(y, tick):.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{_y(y, tick) + 3.5:.1f}" text-anchor="end">{escape(label)}</text>'
        for tick, label in zip(y.ticks, y.labels, strict=True)
    )
    return lines + "".join(
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'
        for x, label in x_ticks
    )


def _step_ticks(steps: Sequence[int]) -> list[tuple[float, str]]:
    """Round steps between the first and the last, with labels."""
    first, last = steps[0], steps[-1]
    if first == last:
        return [(first, f"{first:,}")]
    ticks = [tick for tick in nice_ticks(first, last, 5) if first <= tick <= last and tick == round(tick)]
    labels = tick_labels(ticks, "number") if len(ticks) > 1 else [f"{tick:,.0f}" for tick in ticks]
    return list(zip(ticks, labels, strict=True))


def _bar_ticks(xs: Sequence[float], middles: Sequence[float], steps: Sequence[int]) -> list[tuple[float, str]]:
    """Round steps, each below the bar that is nearest to it."""
    labels = {}
    for tick, label in _step_ticks(steps):
        labels[min(range(len(xs)), key=lambda index: abs(middles[index] - tick))] = label
    return [(xs[index], label) for index, label in labels.items()]


def _runs(xs: Sequence[float], rows: Sequence[Sequence[Value]]) -> list[list[tuple[float, ...]]]:
    """Stretches of points (x, a number of each row) without a non-finite one between.

    A step without a measurement does not end a stretch: evaluations are made at some steps only.
    """
    stretches: list[list[tuple[float, ...]]] = [[]]
    for x, *values in zip(xs, *rows, strict=True):
        if all(is_number(value) for value in values):
            stretches[-1].append((x, *values))
        elif any(value is not None for value in values):
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _band(xs: Sequence[float], one: Series, y: Scale) -> str:
    path = ""
    for stretch in _runs(xs, (one.low or (), one.high or ())):
        upper = [f"{x:.1f} {_y(y, high):.1f}" for x, _, high in stretch]
        lower = [f"{x:.1f} {_y(y, low):.1f}" for x, low, _ in reversed(stretch)]
        path += "M" + "L".join(upper + lower) + "z"
    return f'<path class="band c{one.color}" d="{path}"/>'


def _curve(xs: Sequence[float], one: Series, y: Scale) -> str:
    stretches = _runs(xs, (one.values,))
    path = "".join("M" + "L".join(f"{x:.1f} {_y(y, value):.1f}" for x, value in stretch) for stretch in stretches)
    curve = f'<path class="line{" faint" if one.faint else ""} c{one.color}" d="{path}"/>'
    points = [point for stretch in stretches for point in stretch]
    # A point between two breaks has no line to be seen by.
    lonely = [stretch[0] for stretch in stretches if len(stretch) == 1]
    dots = points if len(points) <= MAX_MARKERS and not one.faint else lonely
    return curve + "".join(
        f'<circle class="dot c{one.color}" cx="{x:.1f}" cy="{_y(y, v):.1f}" r="2.6"/>' for x, v in dots
    )


def _non_finite_marks(xs: Sequence[float], one: Series) -> str:
    """A cross on the bottom line where a number was nan or infinite. `one` is the series as it was before buckets."""
    bottom = HEIGHT - BOTTOM
    buckets = zip(xs, bucket_slices(len(one.values), MAX_POINTS), strict=True)
    broken = [x for x, bucket in buckets if any(v is not None and not is_number(v) for v in one.values[bucket])]
    path = "".join(f"M{x - 3:.1f} {bottom - 7}l6 6m0 -6l-6 6" for x in broken)
    return f'<path class="broken" d="{path}"><title>not finite</title></path>' if path else ""


def _hover_points(xs: Sequence[float], steps: Sequence[int], drawn: Sequence[Series], unit: Unit) -> str:
    """What the page's script shows under the pointer, as JSON; buckets are named '12' or '12-15', with an en dash."""
    spans = [steps[bucket] for bucket in bucket_slices(len(steps), len(xs))]
    points = {
        "x": [round(x, 1) for x in xs],
        "steps": [str(span[0]) if len(span) == 1 else f"{span[0]}\u2013{span[-1]}" for span in spans],
        "unit": unit,
        "series": [{"label": one.label, "color": one.color, "values": _rounded(one.values)} for one in drawn],
    }
    return json.dumps(points, separators=(",", ":"), allow_nan=False)


def _rounded(values: Sequence[Value]) -> list[float | str | None]:
    """Four digits, which is what the pointer shows; 'not finite' in words."""
    return [float(f"{v:.4g}") if is_number(v) else None if v is None else "not finite" for v in values]
