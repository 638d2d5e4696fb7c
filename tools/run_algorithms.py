"""Runs the quickstart's recipes of the algorithms, and prints what they reached as a table.

    python tools/run_algorithms.py ppo dpo             train configs/recipes/quickstart_{ppo,dpo}.yaml, then the table
    python tools/run_algorithms.py dpo name=quickstart_weak algorithm.preference.beta=0.1        the same, set otherwise
    python tools/run_algorithms.py --table             the table of all such runs in runs/

It needs the material of the quickstart, runs/arithmetic and runs/quickstart_sft, in this folder; recipes on preference
data also runs/arithmetic_pairs (tools/make_pairs.py); a recipe that names the run of another recipe, as that of
quickstart_ppo_learned does, that run. A policy that was trained on preferences or on targets is evaluated afterwards on
the held-out problems of the others.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.logs import read_metrics

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
PREFIX = "quickstart_"
ACCURACY = "eval/heldout/accuracy"
SHOWN = (ACCURACY, *(f"eval/heldout/{name}" for name in ("pair_accuracy", "step_accuracy", "abs_error")))
"""Metrics of which the first and the last value say what a run was for; the first that a run has is taken."""
EVALUATED = "evaluated.json"
"""In a run's folder: accuracy before and after, of a run that does not generate."""


def main() -> None:
    """Train what is named; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help="recipes without quickstart_ and .yaml, and settings for them, key=value"
    )
    parser.add_argument("--table", action="store_true", help="print the table of all runs")
    arguments = parser.parse_intermixed_args()
    overrides = [word for word in arguments.names if "=" in word]
    recipes = [word for word in arguments.names if "=" not in word]
    renamed = [word.removeprefix(f"name={PREFIX}") for word in overrides if word.startswith("name=")]
    if renamed and (len(recipes) != 1 or "=" in renamed[-1]):
        parser.error(f"name= is for one recipe, and begins with {PREFIX}")
    trained = renamed[-1:] or recipes
    for recipe, name in zip(recipes, trained, strict=True):
        call("train", recipe, "logging.progress=false", *overrides)
        run = Path("runs") / f"{PREFIX}{name}"
        if config_of(run)["recipe"] in ("preference", "sft"):
            before, after = (accuracy_of(path) for path in (config_of(run)["model"]["hf_path"], str(run / "hf")))
            (run / EVALUATED).write_text(json.dumps({"before": before, "after": after}) + "\n")
    names = sorted(path.name.removeprefix(PREFIX) for path in Path("runs").glob(f"{PREFIX}*"))
    for line in table(names if arguments.table else trained):
        print(line)


def call(command: str, name: str, *overrides: str) -> str:
    """Standard output of a command line on a recipe."""
    arguments = [sys.executable, "-m", "megatron_rl", command, str(RECIPES / f"{PREFIX}{name}.yaml"), *overrides]
    return subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout


def accuracy_of(hf_path: str) -> float:
    """Held-out accuracy of a checkpoint."""
    said = call("evaluate", "rloo", f"model.hf_path={hf_path}", "name=not_a_run", "logging.progress=false")
    return float(json.loads(said[said.index("{") :])[ACCURACY])


def config_of(run: Path) -> dict[str, Any]:
    """The configuration that a run was made with."""
    config: dict[str, Any] = yaml.safe_load(RunDirectory(run).config_file.read_text())
    return config


def table(names: list[str]) -> list[str]:
    """Lines of Markdown: one run each."""
    lines = [
        "| recipe | metric | before | after | steps | seed | seconds in steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        run = Path("runs") / f"{PREFIX}{name}"
        if not RunDirectory(run).metrics_file.is_file():
            continue
        rows = read_metrics(RunDirectory(run).metrics_file)
        seconds = sum(row.get("timing_s/step", 0.0) for row in rows)
        end = f"{max(int(row['step']) for row in rows)} | {config_of(run)['seed']} | {seconds:.0f} |"
        measured = {metric: [row[metric] for row in rows if metric in row] for metric in SHOWN}
        if (run / EVALUATED).is_file():
            found = json.loads((run / EVALUATED).read_text())
            measured[ACCURACY] = [found["before"], found["after"]]
        for metric, values in measured.items():
            if values:
                lines.append(f"| {name} | {metric} | {values[0]:.3f} | {values[-1]:.3f} | {end}")
                break
    return lines


if __name__ == "__main__":
    main()
