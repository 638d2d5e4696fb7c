"""`megatron-rl launch slurm CONFIG [key=value ...] --nodes N`: check a configuration and submit it to Slurm.

What a job asks for comes from the configuration's `slurm:` block; what it does is said in `slurm/train.sbatch`, a
script that can be submitted by hand as well. Everything that can be checked is, before there is a job to wait for.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.cli.train import check_run
from megatron_rl.config.errors import UserError
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config, Recipe
from megatron_rl.config.validate import validate
from megatron_rl.placement.tasks import TaskPlan, check_nodes, task_plan
from megatron_rl.runs.directory import RunDirectory


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("launch", help="submit a run to a scheduler")
    schedulers = parser.add_subparsers(required=True, metavar="SCHEDULER")
    slurm = schedulers.add_parser("slurm", help="submit a training run with sbatch")
    slurm.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, for example configs/recipes/*.yaml")
    slurm.add_argument("overrides", metavar="key=value", nargs="*", help="for example train.num_steps=10")
    slurm.add_argument("--nodes", type=int, help="instead of slurm.nodes")
    slurm.add_argument("--time", help="instead of slurm.time, e.g. 12:00:00")
    slurm.add_argument("--dry-run", action="store_true", help="check everything and show the command")
    slurm.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    own = [] if arguments.nodes is None else [f"slurm.nodes={arguments.nodes}"]
    own += [] if arguments.time is None else [f"slurm.time='{arguments.time}'"]  # quoted: YAML reads 1:30 as a number
    config = load_config(arguments.config, [*arguments.overrides, *own])
    nodes, per_node = config.slurm.nodes, config.slurm.ntasks_per_node
    plan = task_plan(config, nodes * per_node, generates=config.recipe is Recipe.rl)
    validate(config, world_size=plan.num_ranks)
    check_nodes(plan, [per_node] * nodes)
    if not Path(config.slurm.script).is_file():
        raise UserError(f"slurm.script: given '{config.slurm.script}', allowed: an existing file")
    check_run(config, generates=config.recipe is Recipe.rl)
    command = sbatch_command(config, [str(arguments.config), *arguments.overrides])
    if arguments.dry_run:
        print(shlex.join(command))
        print(described(plan, per_node), file=sys.stderr)
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("launch slurm: sbatch is not on the PATH; allowed: a machine that can submit jobs")
    RunDirectory(Path(config.output_dir) / config.name).logs_dir.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command, check=False).returncode


def described(plan: TaskPlan, tasks_per_node: int) -> str:
    """Who does what on which node, in a line: '4 tasks: 0-1 train (node 0); 2-3 engine 0 (node 1)'."""
    groups = [("train", range(plan.num_ranks))]
    groups += [(f"engine {number}", plan.slots(number)) for number in range(plan.num_engines)]
    return f"{plan.num_tasks} tasks: " + "; ".join(
        f"{_span(tasks)} {what} (node {_span(range(tasks[0] // tasks_per_node, tasks[-1] // tasks_per_node + 1))})"
        for what, tasks in groups
    )


def _span(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def sbatch_command(config: Config, arguments: Sequence[str]) -> list[str]:
    """The command line that submits a run.

    Args:
        config: validated for a job of slurm.nodes * slurm.ntasks_per_node tasks.
        arguments: of `megatron-rl train`, for the script.
    """
    slurm = config.slurm
    logs = RunDirectory(Path(config.output_dir) / config.name).logs_dir
    options = {
        "job-name": config.name,
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.ntasks_per_node,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "signal": f"USR1@{slurm.signal_seconds}",
        "output": f"{logs}/slurm_%j.out",
    }
    variables = {
        "MEGATRON_RL_LOGS": str(logs),
        "MEGATRON_RL_MAX_RESTARTS": str(slurm.max_restarts),
        "MEGATRON_RL_CONTAINER": slurm.container,
        "MEGATRON_RL_CONTAINER_RUNTIME": slurm.container_runtime if slurm.container else None,
        "MEGATRON_RL_MOUNTS": slurm.container_mounts,
        **slurm.environment,
    }
    # Through `env`: the values of --export cannot hold a comma, which a list of mounts does.
    exported = [f"{name}={value}" for name, value in variables.items() if value is not None]
    chosen = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["env", *exported, "sbatch", *chosen, *slurm.sbatch_args, slurm.script, *arguments]
