"""Runs the quickstart's recipes of the algorithms, and prints what they reached as a table.

    python tools/run_algorithms.py ppo rloo            train configs/recipes/quickstart_{ppo,rloo}.yaml, then the table
    python tools/run_algorithms.py --table             the table of all such runs in runs/

It needs the quickstart's material, runs/arithmetic and runs/quickstart_sft, in the current folder.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_rl.trainer.metrics_log import read_metrics
from megatron_rl.trainer.run_directory import RunDirectory

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
PREFIX = "quickstart_"
SHOWN = ("eval/heldout/accuracy", "preference/accuracy", "eval/heldout/pair_accuracy")
"""Metrics of which the first and the last value say what a run was for; the first that a run has is taken."""


def main() -> None:
    """Train what is named; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recipes without quickstart_ and .yaml")
    parser.add_argument("--table", action="store_true", help="print the table of all runs")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help="for every run")
    arguments = parser.parse_args()
    for name in arguments.names:
        recipe = RECIPES / f"{PREFIX}{name}.yaml"
        command = [sys.executable, "-m", "megatron_rl", "train", str(recipe), "logging.progress=false"]
        subprocess.run([*command, *arguments.overrides], check=True)
    names = sorted(path.name.removeprefix(PREFIX) for path in Path("runs").glob(f"{PREFIX}*"))
    for line in table(names if arguments.table else arguments.names):
        print(line)


def table(names: list[str]) -> list[str]:
    """Lines of Markdown: one run each."""
    lines = [
        "| recipe | metric | before | after | steps | seed | seconds in steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        run = RunDirectory(Path("runs") / f"{PREFIX}{name}")
        if not run.metrics_file.is_file():
            continue
        rows = read_metrics(run.metrics_file)
        config = yaml.safe_load(run.config_file.read_text())
        seconds = sum(row.get("timing_s/step", 0.0) for row in rows)
        for metric in SHOWN:
            values = [row[metric] for row in rows if metric in row]
            if values:
                step = int(max(row["step"] for row in rows))
                numbers = f"{values[0]:.3f} | {values[-1]:.3f} | {step} | {config['seed']} | {seconds:.0f}"
                lines.append(f"| {name} | {metric} | {numbers} |")
                break
    return lines


if __name__ == "__main__":
    main()
