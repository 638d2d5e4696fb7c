"""`train` and `evaluate`: check everything that can be checked, then be a rank or start the ranks.

    started by torchrun or srun   this process is one of the ranks
    started by srun, and not one  this process keeps an engine, or lends its GPU to one; see `placement.tasks`
    else, a layout of one rank    this process is that rank
    else                          start the ranks on this machine

A mistake is thus found before any process starts, or, among ranks that others started, by all of them alike before
they wait for each other.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_rl.cli.launch_local import launch
from megatron_rl.cli.rank_environment import free_port, rank_of_this_machine, rank_variables, slurm_task, tell_exit_code
from megatron_rl.config.errors import EXIT_RESUME, ConfigError
from megatron_rl.config.hf_checkpoint import read_json_object
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config, Recipe
from megatron_rl.config.validate import validate
from megatron_rl.config.world import longest_sequence
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.datasets import load_prompts, load_sft
from megatron_rl.data.files import DataError, read_rows
from megatron_rl.data.preferences import load_preferences
from megatron_rl.models.capabilities import capabilities
from megatron_rl.models.choices import asks_for_hardware, check_engines, choose
from megatron_rl.models.families import check_family, family_of
from megatron_rl.placement.layout import Layout, layout_of
from megatron_rl.rewards.references import check_references
from megatron_rl.rewards.scoring import BoundReward, resolve_rewards
from megatron_rl.rollout.hosting import FOLDER_VARIABLE, end_hosts
from megatron_rl.runs.directory import RunDirectory
from megatron_rl.weights.files.hf_checkpoint import HFCheckpointFiles

# Told to the ranks that are started here, so that not each of them reads all data twice.
_DATA_CHECKED = "--data-checked"

Work = Callable[[Config, Layout], object]


def add_train_parser(subparsers: Any) -> None:
    """Add `train`: train, or go on with a run that was interrupted."""
    parser = subparsers.add_parser(
        "train",
        help="train; the same command again resumes",
        description="Train. Inside torchrun or srun this process is one rank; elsewhere the layout's ranks are "
        "started on this machine.",
    )
    _add_config_arguments(parser)
    parser.set_defaults(run=train)


def add_evaluate_parser(subparsers: Any) -> None:
    """Add `evaluate`: the held-out metrics of a policy, as JSON on stdout."""
    parser = subparsers.add_parser(
        "evaluate", help="evaluate on data.eval", description="Evaluate a policy on data.eval; ranks start as in train."
    )
    _add_config_arguments(parser)
    parser.set_defaults(run=evaluate)


def train(arguments: argparse.Namespace) -> int:
    """Run `train`."""
    return start(arguments, _import_train, command="train", evaluates=False)


def evaluate(arguments: argparse.Namespace) -> int:
    """Run `evaluate`."""
    return start(arguments, _import_evaluate, command="evaluate", evaluates=True)


def _import_train() -> Work:
    from megatron_rl.trainer.run import train

    return train


def _import_evaluate() -> Work:
    from megatron_rl.trainer.run import evaluate

    def evaluate_and_print(config: Config, layout: Layout) -> None:
        metrics = evaluate(config, layout)
        if os.environ["RANK"] == "0":
            print(json.dumps(metrics, indent=2))

    return evaluate_and_print


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a configuration."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, for example configs/recipes/*.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="for example train.num_steps=10")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would run")
    parser.add_argument(_DATA_CHECKED, action="store_true", help=argparse.SUPPRESS)


def start(arguments: argparse.Namespace, import_work: Callable[[], Work], *, command: str, evaluates: bool) -> int:
    """Do a command's work on the ranks of its configuration, and return the exit code.

    Args:
        arguments: of `_add_config_arguments`.
        import_work: imports, in a rank alone, what runs there; it takes seconds.
        command: its name on the command line, with which the ranks are started.
        evaluates: whether it evaluates and does not train.

    Raises:
        UserError: the configuration, the checkpoint, the data or the rewards cannot be used.
    """
    config = load_config(arguments.config, arguments.overrides)
    if evaluates and config.data.eval is None:
        raise ConfigError(f"data.eval: given null, allowed: a file, for {command}")
    generates = evaluates or config.recipe is Recipe.rl
    variables = rank_variables(os.environ)
    job = slurm_task(config, os.environ, generates=generates)
    world_size = job.plan.num_ranks if job else int(variables["WORLD_SIZE"]) if variables else None
    validate(config, world_size=world_size, evaluates=evaluates)
    layout = layout_of(config, world_size)
    rows = check_run(config, generates=generates, with_data=not arguments.data_checked)
    if arguments.dry_run:
        print(_summary(config, layout, rows))
        return 0
    if job and job.engine is not None:
        job.keep_engine(config)
        return 0
    if variables is not None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _leave_before_the_first_step)
    if asks_for_hardware(config):
        choose(capabilities(), config.model, config.optimizer.implementation)
        check_engines(capabilities(), config.rollout)
    is_first = (variables or {"RANK": "0"})["RANK"] == "0"
    if is_first and not evaluates and not arguments.data_checked:  # engines take a while to start before the first bar
        print(f"{Path(config.output_dir) / config.name}: {config.recipe.name} on {_ranks(layout)}", flush=True)
    if variables is None and layout.world_size > 1:
        rank_command = [sys.executable, "-m", "megatron_rl", command, _DATA_CHECKED, str(arguments.config)]
        logs = RunDirectory(Path(config.output_dir) / config.name).logs_dir
        return launch([*rank_command, *arguments.overrides], num_ranks=layout.world_size, logs=logs)
    os.environ.update(variables or rank_of_this_machine(0, 1, free_port()))
    with job.as_rank() if job else contextlib.nullcontext():
        import_work()(config, layout)
    return 0


def _leave_before_the_first_step(number: int, frame: FrameType | None) -> None:
    """Told to stop while the rank still starts: there is nothing to save, and another start to ask for.

    At once: what is imported or waited for here may catch any exception. The trainer takes the signals over later.
    """
    told = f"{signal.Signals(number).name} before the first step: nothing is lost; the same command starts again"
    print(f"megatron-rl: {told}", file=sys.stderr, flush=True)
    if FOLDER_VARIABLE in os.environ:
        end_hosts(Path(os.environ[FOLDER_VARIABLE]))
    os._exit(tell_exit_code(EXIT_RESUME))


def check_run(config: Config, *, generates: bool, with_data: bool = True) -> dict[str, int]:
    """Find and check all that a run will use: model files, functions that are named, and the data.

    Args:
        config: validated.
        generates: whether the data are prompts to complete.
        with_data: False leaves out the data, which another process has checked.

    Returns:
        The number of rows of each file.

    Raises:
        UserError: the first thing that cannot be used.
    """
    check_model_files(Path(config.model.hf_path), weights=config.model.load_weights)
    rewards = resolve_rewards(config.rewards)
    rows = check_data(config, rewards, as_prompts=generates) if with_data else {}
    from megatron_rl.objectives.choices import resolve_choices  # imports torch, which what is above need not wait for

    resolve_choices(config)
    return rows


def check_model_files(folder: Path, *, weights: bool) -> None:
    """Check config.json, and the headers of the weights, in the words of the model's family.

    Raises:
        UserError: the family cannot build the model, or the weights are not its.
    """
    hf = read_json_object(folder / "config.json", "model.hf_path")
    check_family(hf)
    if weights:
        HFCheckpointFiles(folder).check(family_of(hf).tensor_maps(hf))


def check_data(config: Config, rewards: Sequence[BoundReward], *, as_prompts: bool) -> dict[str, int]:
    """Read and tokenise all data as the run will; return the number of rows of each file.

    Args:
        config: validated.
        rewards: that are to grade completions of the prompts.
        as_prompts: whether the rows are prompts to complete, or prompts with responses to learn.

    Raises:
        DataError: a row or its reference answer cannot be used; it is named by file and line.
    """
    files = [file for file in (config.data.train, config.data.eval) if file is not None]
    for file in files:  # before importing transformers, which takes seconds that a typo in a line need not wait
        for _ in read_rows(file, config.data.format):
            pass
    vocab_size = int(read_json_object(Path(config.model.hf_path) / "config.json", "model.hf_path")["vocab_size"])
    tokenizer, rows = load_tokenizer(config.model.hf_path), {}
    for file in files:
        if as_prompts:
            prompts = load_prompts(file, config.data, tokenizer, max_prompt_tokens=config.data.max_prompt_tokens)
            check_references(prompts, rewards, tolerated=config.rewards.unreadable_references)
            ids = [prompt.token_ids for prompt in prompts]
        elif config.recipe in (Recipe.preference, Recipe.reward_model):
            examples = load_preferences(file, config.data, tokenizer, max_tokens=longest_sequence(config))
            ids = [one.prompt_ids + one.completion_ids for example in examples for one in example]
        else:
            sequences = load_sft(file, config.data, tokenizer, max_tokens=longest_sequence(config))
            ids = [tuple(sequence.token_ids.tolist()) for sequence in sequences]
        check_token_ids(file, ids, vocab_size)
        per_row = 1 if as_prompts or config.recipe is Recipe.sft else len(examples[0])
        rows[file] = len(ids) // per_row
    return rows


def check_token_ids(file: str, rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise DataError for the first sequence of a file with a token that the model has no row for."""
    for number, ids in enumerate(rows, start=1):
        if max(ids) >= vocab_size:
            raise DataError(
                f"{file}: sequence {number} has token id {max(ids)}, vocab_size in config.json is {vocab_size}: "
                "the tokenizer has more tokens than the model has rows"
            )


def _ranks(layout: Layout) -> str:
    tp, pp, dp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.data_parallel_size
    return f"{layout.world_size} ranks = tensor {tp} x pipeline {pp} x data {dp}"


def _summary(config: Config, layout: Layout, rows: dict[str, int]) -> str:
    lines = [
        f"run      {Path(config.output_dir) / config.name}",
        f"recipe   {config.recipe.name}, {config.train.num_steps} steps",
        f"model    {config.model.hf_path}",
        *(f"data     {file}, {count} rows" for file, count in rows.items()),
        f"layout   {_ranks(layout)}",
    ]
    if config.recipe is Recipe.rl:
        rollout = config.rollout
        lines += [
            f"engines  {layout.num_engines} of {layout.engine_size} ranks",
            f"step     {rollout.num_prompts_per_step} prompts x {rollout.num_samples_per_prompt} samples",
        ]
    else:
        lines.append(f"step     {config.train.global_batch_size} samples")
    return "\n".join([*lines, f"length   at most {longest_sequence(config)} tokens of prompt and response"])
