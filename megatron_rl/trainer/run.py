"""The entry points of a rank: train or evaluate what a validated configuration says."""

import os
from pathlib import Path

from megatron_rl.config.errors import Interrupted
from megatron_rl.config.schema import Config, Recipe
from megatron_rl.engine.initialize import finalize, initialize
from megatron_rl.objectives.choices import resolve_choices
from megatron_rl.placement.layout import Layout
from megatron_rl.report.report import write_report
from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.progress import say
from megatron_rl.trainer.loop import train_rl
from megatron_rl.trainer.preference import train_preference, train_reward_model
from megatron_rl.trainer.rl import RLTrainer
from megatron_rl.trainer.sft import train_sft

_OTHERS = {Recipe.sft: train_sft, Recipe.preference: train_preference, Recipe.reward_model: train_reward_model}


def train(config: Config, layout: Layout) -> None:
    """Run or resume training on this rank; the report is written at the end, also of a run that failed.

    Raises:
        UserError: something that the user gave cannot be used.
        Interrupted: the run was told to stop; its state is saved, and this rank has left the world.
    """
    resolve_choices(config)
    groups = initialize(config.parallel, seed=config.seed)
    try:
        if config.recipe is Recipe.rl:
            train_rl(config, groups, layout)
        else:
            _OTHERS[config.recipe](config, groups)
    except Interrupted:
        finalize()
        raise
    finally:
        if os.environ["RANK"] == "0":
            _report(RunDirectory(Path(config.output_dir) / config.name))
    finalize()


def _report(run: RunDirectory) -> None:
    if not run.metrics_file.exists():
        return
    try:
        write_report(run.path)
    except OSError as error:  # a full disk; what ended the run is more important
        say(f"{run.report_file} cannot be written: {error}")


def evaluate(config: Config, layout: Layout) -> dict[str, float]:
    """Held-out metrics of the run's latest checkpoint, or of model.hf_path where there is none; nothing is written."""
    groups = initialize(config.parallel, seed=config.seed)
    rl = RLTrainer(config, groups, layout, records=False)
    rl.sync_weights()
    metrics = rl.evaluate()
    finalize()
    return metrics
