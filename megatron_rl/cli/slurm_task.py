"""What this process is among the tasks that srun started: a training rank, or part of an engine.

Every task reads the same configuration and the same variables of Slurm, and so comes to the same plan.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.cli.rank_environment import attempt, rank_variables, started_by_srun, tasks_of_nodes
from megatron_rl.config.schema import Config
from megatron_rl.placement.tasks import TaskPlan, check_nodes, task_plan
from megatron_rl.trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class SlurmTask:
    """One of the tasks of a step."""

    number: int
    local_number: int
    """On its node."""
    first_host: str
    """Of the training ranks."""
    plan: TaskPlan
    engines: Path
    """Where engines and the ranks that drive them find each other, in this attempt."""

    @property
    def engine(self) -> int | None:
        """Number of the engine that it is a part of; None: it is a training rank."""
        return self.plan.engine(self.number)

    def keep_engine(self, config: Config) -> None:
        """Start the engine and keep it until the ranks have ended; a task that only lends it its GPU is done at once.

        Raises:
            EngineLost: the engine does not start.
        """
        from megatron_rl.trainer.engines import keep_engine

        assert self.engine is not None
        if self.number == self.plan.slots(self.engine)[0]:
            keep_engine(config, self.engine, self.engines, reached_from=self.first_host, first_slot=self.local_number)

    @contextlib.contextmanager
    def as_rank(self) -> Iterator[None]:
        """Be a training rank in here: one of fewer than there are tasks. Engines that have hosts end with it."""
        from megatron_rl.rollout.hosting import FOLDER_VARIABLE, end_hosts

        os.environ["WORLD_SIZE"] = str(self.plan.num_ranks)
        if not self.plan.num_engines:
            yield
            return
        os.environ[FOLDER_VARIABLE] = str(self.engines)
        try:
            yield
        finally:
            end_hosts(self.engines)


def slurm_task(config: Config, environment: Mapping[str, str], *, generates: bool) -> SlurmTask | None:
    """What this process is; None: srun did not start it, or it alone.

    Args:
        config: yet to be validated for the ranks of the plan.
        environment: of the process.
        generates: whether the run has engines.

    Raises:
        ConfigError: engines do not fit the tasks and nodes of the step.
        EnvironmentVariableError: Slurm's variables contradict each other.
    """
    variables = rank_variables(environment)
    if variables is None or not started_by_srun(environment):
        return None
    plan = task_plan(config, int(variables["WORLD_SIZE"]), generates=generates)
    if (nodes := tasks_of_nodes(environment)) is not None:
        check_nodes(plan, nodes)
    return SlurmTask(
        number=int(variables["RANK"]),
        local_number=int(variables["LOCAL_RANK"]),
        first_host=variables["MASTER_ADDR"],
        plan=plan,
        engines=RunDirectory(Path(config.output_dir) / config.name).logs_dir / "engines" / attempt(environment),
    )
