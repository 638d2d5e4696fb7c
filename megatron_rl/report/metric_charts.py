"""Which metric is drawn in which chart of the report: a table, and the few lines that read it.

A metric that no line of the table names is still shown, in the section "More metrics", so a custom reward or a new
metric needs no change here. A chart without data is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.report.charts import line_chart, stacked_bars
from megatron_rl.report.scales import ScaleKind, Series, Unit, Value, is_number

Rows = Mapping[int, Mapping[str, float]]
"""Metrics by step, ascending; the rows of one step are merged."""

MAX_MORE_CHARTS = 16
"""Charts of unlisted metrics: the page stays below a megabyte. The table of the last step has all metrics."""


@dataclass(frozen=True)
class ChartSpec:
    """One chart: its curves by metric name, with their labels, and how their numbers are shown."""

    section: str
    title: str
    lines: Mapping[str, str]
    unit_name: str = ""
    unit: Unit = "number"
    scale: ScaleKind = "linear"
    from_zero: bool = False
    std: str = ""
    """Metric with the standard deviation of the first line: its band."""


CHARTS = (
    ChartSpec("Learning", "Loss", {"sft/loss": ""}, "nats per token"),
    ChartSpec("Learning", "Loss on preferences", {"preference/loss": ""}),
    ChartSpec("Learning", "Pairs ranked rightly", {"preference/accuracy": ""}, "of pairs", "percent"),
    ChartSpec(
        "Learning",
        "Rewards of a pair",
        {"preference/chosen_reward": "chosen", "preference/rejected_reward": "rejected"},
    ),
    ChartSpec(
        "Learning",
        "Reward",
        {"reward/mean": "mean ± standard deviation", "reward/min": "min", "reward/max": "max"},
        std="reward/std",
    ),
    ChartSpec("Learning", "Response length", {"response/length_mean": ""}, "tokens", from_zero=True),
    ChartSpec(
        "Learning",
        "Truncated responses",
        {"response/truncated_fraction": ""},
        "of responses",
        "percent",
        from_zero=True,
    ),
    ChartSpec("Learning", "Entropy", {"policy/entropy": ""}, "nats per token"),
    ChartSpec(
        "Learning",
        "KL divergence",
        {"policy/approx_kl": "from the old policy", "policy/kl_ref": "from the reference"},
        "nats per token",
        from_zero=True,
    ),
    ChartSpec(
        "Update",
        "Clipped tokens",
        {
            "policy/clip_fraction": "all",
            "policy/clip_fraction_low": "below",
            "policy/clip_fraction_high": "above",
            "policy/clip_fraction_dual": "dual",
        },
        "of tokens",
        "percent",
        from_zero=True,
    ),
    ChartSpec("Update", "Probability ratio", {"policy/ratio_max": "max", "policy/ratio_min": "min"}, scale="auto"),
    ChartSpec(
        "Update",
        "Policy loss",
        {
            "policy/loss": "whole",
            "policy/loss_policy": "policy",
            "policy/loss_value": "value",
            "policy/loss_entropy": "entropy",
            "policy/loss_kl": "KL",
        },
    ),
    ChartSpec(
        "Update",
        "Policy change of a step",
        {"policy/change_mean": "mean", "policy/change_max": "max"},
        "nats",
        scale="auto",
    ),
    ChartSpec("Update", "KL coefficient", {"policy/kl_coefficient": ""}, scale="auto"),
    ChartSpec(
        "Convergence", "Variance of the policy loss", {"convergence/loss_variance": ""}, "over the window", scale="auto"
    ),
    ChartSpec("Convergence", "Policy change", {"convergence/policy_change": ""}, "nats, over the window", scale="auto"),
    ChartSpec("Convergence", "Converged", {"convergence/converged": ""}, from_zero=True),
    ChartSpec("Update", "Gradient norm", {"optim/grad_norm": ""}, "before clipping", scale="auto"),
    ChartSpec("Update", "Learning rate", {"optim/lr": ""}, from_zero=True),
    ChartSpec("Value function", "Value loss", {"value/loss": ""}, scale="auto"),
    ChartSpec("Value function", "Explained variance", {"value/explained_variance": ""}),
    ChartSpec("Value function", "Values and returns", {"value/mean": "values", "value/return_mean": "returns"}),
    ChartSpec(
        "Value function", "Gradient norm of the critic", {"value/grad_norm": ""}, "before clipping", scale="auto"
    ),
    ChartSpec(
        "Rollout against training",
        "Log-prob difference",
        {"mismatch/log_prob_abs_diff_mean": "mean", "mismatch/log_prob_abs_diff_max": "max"},
        "nats",
        scale="log",
    ),
    ChartSpec("Rollout against training", "KL of the mismatch", {"mismatch/kl": ""}, "nats per token", scale="log"),
    ChartSpec(
        "Rollout against training", "Token probability error", {"mismatch/token_mult_prob_error": ""}, "mean factor"
    ),
    ChartSpec(
        "Rollout against training",
        "Importance ratio",
        {"importance/ratio_max": "max", "importance/ratio_mean": "mean", "importance/ratio_min": "min"},
        scale="auto",
    ),
    ChartSpec(
        "Rollout against training",
        "Tokens outside the bounds",
        {"importance/above_fraction": "above", "importance/below_fraction": "below"},
        "of tokens",
        "percent",
        from_zero=True,
    ),
    ChartSpec(
        "Rollout against training",
        "Effective sample size",
        {"importance/effective_sample_size": ""},
        "of tokens",
        "percent",
    ),
    ChartSpec("Speed", "Throughput", {"throughput/tokens_per_second": ""}, "tokens per second", from_zero=True),
    ChartSpec(
        "Speed",
        "Throughput of one GPU",
        {"throughput/tokens_per_second_per_gpu": ""},
        "tokens per second",
        from_zero=True,
    ),
    ChartSpec("Speed", "Model FLOPs utilisation", {"throughput/mfu": ""}, "of the peak", "percent", from_zero=True),
    ChartSpec(
        "Speed", "Packing efficiency", {"data/packing_efficiency": ""}, "of positions", "percent", from_zero=True
    ),
)
PHASES = ("generate", "score", "advantages", "log_probs", "train", "sync_weights")
"""Parts of a step in the order of the loop; each keeps its colour, whichever others a run has."""
OTHER_COLOR = 6
"""The grey of the palette."""


def chart_sections(rows: Rows) -> dict[str, list[str]]:
    """HTML of the charts by section, in the order of the page."""
    sections: dict[str, list[str]] = {"Learning": evaluation_charts(rows)}
    for spec in CHARTS:
        sections.setdefault(spec.section, []).extend(_chart(rows, spec))
    sections["Speed"] += timing_chart(rows)
    drawn = {name for spec in CHARTS for name in [*spec.lines, spec.std]} | {"sync/version"}
    drawn |= {f"eval/{data_set}/{name}" for data_set in evaluated_sets(rows) for name in ("accuracy", "pass_at_k")}
    columns: dict[str, set[float]] = {}
    for row in rows.values():
        for name, value in row.items():
            columns.setdefault(name, set()).add(value)
    # A constant is read more easily in the table, and so is a number that was measured once.
    varying = sorted(name for name, values in columns.items() if len(values) > 1)
    more = [name for name in varying if name not in drawn and not name.startswith("timing_s/")]
    specs = [ChartSpec("", name, {name: ""}, scale="auto") for name in more]
    sections["More metrics"] = [chart for spec in specs for chart in _chart(rows, spec)][:MAX_MORE_CHARTS]
    return {section: charts for section, charts in sections.items() if charts}


def evaluation_charts(rows: Rows) -> list[str]:
    """One chart per held-out set: accuracy and, where it was measured, pass@k."""
    charts = []
    for data_set in evaluated_sets(rows):
        lines = {f"eval/{data_set}/accuracy": "accuracy", f"eval/{data_set}/pass_at_k": "pass@k"}
        charts += _chart(rows, ChartSpec("", f"Held-out accuracy: {data_set}", lines, unit="percent"))
    return charts


def evaluated_sets(rows: Rows) -> list[str]:
    """The names in eval/<name>/..., sorted."""
    return sorted({name.split("/")[1] for row in rows.values() for name in row if name.startswith("eval/")})


def timing_chart(rows: Rows) -> list[str]:
    """Where the seconds of a step go. What the phases leave of timing_s/step is 'other'."""
    names = {name for row in rows.values() for name in row if name.startswith("timing_s/")} - {"timing_s/step"}
    known = [f"timing_s/{phase}" for phase in PHASES]
    ordered = [name for name in known if name in names] + sorted(names - set(known))
    steps = [step for step, row in rows.items() if any(name in row for name in ordered)]
    if not steps:
        return []
    series = []
    for name in ordered:
        color = known.index(name) if name in known else OTHER_COLOR
        series.append(Series(name.removeprefix("timing_s/"), _column(rows, steps, name), color=color))
    spent = [sum(number for one in series if is_number(number := one.values[index])) for index in range(len(steps))]
    whole = _column(rows, steps, "timing_s/step")
    other = [max(0.0, w - s) if is_number(w) else 0.0 for w, s in zip(whole, spent, strict=True)]
    # Below a thousandth it would be a line in the legend that no one can see in the chart.
    if sum(other) > 1e-3 * sum(spent):
        series.append(Series("other", other, color=OTHER_COLOR))
    return [stacked_bars("Time of a step", steps, series, unit_name="seconds")]


def _chart(rows: Rows, spec: ChartSpec) -> list[str]:
    """The chart in a list, or no chart if none of its metrics has a finite number."""
    present = [name for name in spec.lines if any(is_number(row.get(name)) for row in rows.values())]
    if not present:
        return []
    steps = [step for step, row in rows.items() if any(name in row for name in present)]
    series = [_series(rows, steps, spec, name, alone=len(present) == 1) for name in present]
    return [
        line_chart(
            spec.title,
            steps,
            series,
            unit=spec.unit,
            unit_name=spec.unit_name,
            scale=spec.scale,
            from_zero=spec.from_zero,
        )
    ]


def _series(rows: Rows, steps: Sequence[int], spec: ChartSpec, name: str, *, alone: bool) -> Series:
    order = list(spec.lines).index(name)
    values = _column(rows, steps, name)
    # 'accuracy' is worth saying where pass@k is missing; a single unlabelled curve is named by the title.
    label = spec.lines[name] if not alone or order > 0 or spec.std else ""
    if order > 0 or not spec.std:
        return Series(label, values, color=order, faint=bool(spec.std))
    deviations = _column(rows, steps, spec.std)
    pairs = list(zip(values, deviations, strict=True))
    return Series(
        label,
        values,
        low=[v - d if is_number(v) and is_number(d) else v for v, d in pairs],
        high=[v + d if is_number(v) and is_number(d) else v for v, d in pairs],
    )


def _column(rows: Rows, steps: Sequence[int], name: str) -> list[Value]:
    return [rows[step].get(name) for step in steps]
