"""report.html: a run on one page, from what its folder holds.

    config.yaml, metrics.jsonl, rollouts/, logs/versions.json  ->  `write_report`  ->  report.html

It reads files and nothing else, so it also works on a run that is still going or that died, on a machine without torch.
This file decides what is said; `metric_charts` draws, `page` writes the HTML.
"""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_rl.report.metric_charts import Rows, chart_sections, evaluated_sets
from megatron_rl.report.page import Headline, Page, page_html
from megatron_rl.report.scales import is_number
from megatron_rl.runs.directory import RunDirectory, write_atomically
from megatron_rl.runs.logs import read_metrics, read_rollouts, rollout_steps

SAMPLES_PER_STEP = 4
"""Completions shown of each of the first, middle and last logged steps: the first ones of the file, not chosen ones."""
_RECIPES = {
    "rl": "reinforcement learning",
    "sft": "supervised fine-tuning",
    "preference": "preference training",
    "reward_model": "reward model",
}
MAX_NON_FINITE_NAMED = 6
"""Places named in the note on non-finite numbers."""


def write_report(run_dir: Path | str) -> Path:
    """Write <run_dir>/report.html, one file without external resources, and return its path.

    Raises:
        ValueError: run_dir holds no run (no config.yaml), or its metrics.jsonl is damaged before the last line.
    """
    run = RunDirectory(Path(run_dir))
    if not run.config_file.is_file():
        raise ValueError(f"{run.path}: not a run's folder: it has no {run.config_file.name}")
    config_text = run.config_file.read_text(encoding="utf-8")
    config = OmegaConf.create(config_text)
    if not isinstance(config, DictConfig):
        raise ValueError(f"{run.config_file}: expected a mapping")
    rows = merge_steps(_drawable(read_metrics(run.metrics_file)) if run.metrics_file.is_file() else [])
    page = Page(
        name=str(_get(config, "name") or run.path.resolve().name),
        facts=facts(config, rows) | written_at(run) | versions(run),
        headlines=headlines(config, rows),
        notes=notes(rows),
        charts=chart_sections(rows),
        table=first_and_last(rows),
        samples=sample_rollouts(run),
        config_text=config_text,
    )
    write_atomically(run.report_file, page_html(page))
    return run.report_file


_LARGEST = 1e300
"""Beyond this the difference of two numbers may be no number."""


def _drawable(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows with nan in the place of what no axis reaches."""
    return [
        {key: math.nan if isinstance(v, float) and abs(v) > _LARGEST else v for key, v in row.items()} for row in rows
    ]


def merge_steps(rows: Sequence[dict[str, float]]) -> Rows:
    """Metrics by step, ascending. A step's later rows (an evaluation, say) add to its first."""
    merged: dict[int, dict[str, float]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update({name: row[name] for name in row if name != "step"})
    return {step: merged[step] for step in sorted(merged)}


def facts(config: DictConfig, rows: Rows) -> dict[str, str]:
    """What kind of run it is and how far it got: label -> value."""
    recipe = _get(config, "recipe")
    found = {"Recipe": _RECIPES.get(str(recipe), str(recipe))}
    if hf_path := _get(config, "model.hf_path"):
        found["Model"] = Path(str(hf_path)).name
    sizes = {
        "TP": _get(config, "parallel.tensor_model_parallel_size"),
        "PP": _get(config, "parallel.pipeline_model_parallel_size"),
        "DP": _get(config, "parallel.data_parallel_size"),
    }
    layout = [f"{name} {size}" for name, size in sizes.items() if size is not None]
    if _get(config, "parallel.sequence_parallel"):
        layout.append("sequence parallel")
    if layout:
        found["Layout"] = " · ".join(layout)
    prompts, samples = _get(config, "rollout.num_prompts_per_step"), _get(config, "rollout.num_samples_per_prompt")
    if recipe == "rl" and prompts and samples:
        found["Batch"] = f"{prompts:,} prompts \u00d7 {samples} samples"
    elif batch := _get(config, "train.global_batch_size"):
        found["Batch"] = f"{batch:,} samples"
    total, last = _get(config, "train.num_steps"), max(rows, default=0)
    found["Steps"] = f"{last:,} of {total:,}" if total else f"{last:,}"
    seconds = sum(row["timing_s/step"] for row in rows.values() if is_number(row.get("timing_s/step")))
    if seconds:
        found["Time in steps"] = duration(seconds)
    return found


def duration(seconds: float) -> str:
    """'45 s', '12 min 5 s', '3 h 20 min', '2 d 4 h': the two largest units."""
    units = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")]
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.2g} s"
    largest = next(index for index, (size, _) in enumerate(units) if whole >= size)
    words = []
    for size, unit in units[largest : largest + 2]:
        count, whole = divmod(whole, size)
        words += [f"{count} {unit}"] if count else []
    return " ".join(words)


def written_at(run: RunDirectory) -> dict[str, str]:
    """When the last row was written, so that a stalled or dead run is seen to be one."""
    if not run.metrics_file.is_file():
        return {}
    time = datetime.fromtimestamp(run.metrics_file.stat().st_mtime, UTC)
    return {"Last metrics": f"{time:%Y-%m-%d %H:%M} UTC"}


def versions(run: RunDirectory) -> dict[str, str]:
    """The packages of the run's latest start."""
    if not run.versions_file.is_file():
        return {}
    installed = json.loads(run.versions_file.read_text(encoding="utf-8"))
    return {"Versions": ", ".join(f"{name} {version}" for name, version in installed.items())}


def headlines(config: DictConfig, rows: Rows) -> list[Headline]:
    """First and last value of what a run is for: held-out accuracy, then reward, then the loss of SFT."""
    k = _get(config, "evaluation.num_samples_per_prompt")
    wanted: list[tuple[str, str, bool]] = []
    for data_set in evaluated_sets(rows):
        wanted.append((f"Held-out accuracy, {data_set}", f"eval/{data_set}/accuracy", True))
        # With one sample per prompt pass@k says what accuracy says.
        if k != 1:
            wanted.append((f"Held-out pass@{k or 'k'}, {data_set}", f"eval/{data_set}/pass_at_k", True))
    wanted += [("Mean reward", "reward/mean", False), ("Loss", "sft/loss", False)]
    wanted += [("Loss on preferences", "preference/loss", False)]
    found = []
    for title, name, percent in wanted:
        points = [(step, row[name]) for step, row in rows.items() if is_number(row.get(name))]
        if points:
            found.append(Headline(title, points[0], points[-1], percent))
    return found


def notes(rows: Rows) -> list[str]:
    """What a reader has to know before trusting the curves."""
    if not rows:
        return ["No step has been logged yet."]
    broken = [(name, step) for step, row in rows.items() for name, value in row.items() if not is_number(value)]
    if not broken:
        return []
    named = ", ".join(f"{name} at step {step:,}" for name, step in broken[:MAX_NON_FINITE_NAMED])
    more = f" and {len(broken) - MAX_NON_FINITE_NAMED:,} more" if len(broken) > MAX_NON_FINITE_NAMED else ""
    return [f"Not finite, and marked by a cross in the charts: {named}{more}."]


def first_and_last(rows: Rows) -> dict[str, tuple[float | None, float | None]]:
    """Of each metric of the last training step: its first value and its last."""
    training = [row for row in rows.values() if any(not name.startswith("eval/") for name in row)]
    if not training:
        return {}
    first_seen: dict[str, float] = {}
    for row in training:
        first_seen = {**row, **first_seen}
    return {name: (first_seen[name], training[-1][name]) for name in sorted(training[-1])}


def sample_rollouts(run: RunDirectory) -> dict[int, list[dict[str, Any]]]:
    """Completions of the first, the middle and the last logged step."""
    steps = rollout_steps(run)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return {step: read_rollouts(run, step)[:SAMPLES_PER_STEP] for step in chosen}


def _get(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, default=None, throw_on_missing=False)
