"""The entry points of a rank: train or evaluate what a validated configuration says."""

from pathlib import Path

from megatron_rl.config.schema import Config, Recipe
from megatron_rl.engine.initialize import finalize, initialize
from megatron_rl.placement.layout import Layout
from megatron_rl.trainer.loop import train_rl
from megatron_rl.trainer.reinforcement import Reinforcement
from megatron_rl.trainer.report import write_report
from megatron_rl.trainer.run_directory import RunDirectory
from megatron_rl.trainer.sft import train_sft


def train(config: Config, layout: Layout) -> None:
    """Run or resume training on this rank; the report is written at the end, also of a run that failed.

    Raises:
        UserError: something that the user gave cannot be used.
    """
    groups = initialize(config.parallel, seed=config.seed)
    try:
        if config.recipe is Recipe.sft:
            train_sft(config, groups)
        else:
            train_rl(config, groups, layout)
    finally:
        run = RunDirectory(Path(config.output_dir) / config.name)
        if groups.world.rank() == 0 and run.metrics_file.exists():
            write_report(run.path)
    finalize()


def evaluate(config: Config, layout: Layout) -> dict[str, float]:
    """Held-out metrics of the run's latest checkpoint, or of model.hf_path where there is none; nothing is written."""
    groups = initialize(config.parallel, seed=config.seed)
    rl = Reinforcement(config, groups, layout, records=False)
    rl.sync_weights()
    metrics = rl.evaluate()
    finalize()
    return metrics
