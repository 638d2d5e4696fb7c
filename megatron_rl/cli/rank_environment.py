"""Which rank this process is: from the variables of torchrun or srun, or alone on this machine.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. srun sets its own variables, from which the
same five follow with no message between the ranks. Functions take the environment as an argument and return values.

`slurm_task` says what this process is among the tasks that srun started: a training rank, or part of an engine. Every
task reads the same configuration and the same variables of Slurm, and so comes to the same plan.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import Config
from megatron_rl.placement.tasks import TaskPlan, check_nodes, task_plan
from megatron_rl.runs.directory import RunDirectory

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class EnvironmentVariableError(UserError):
    """The launcher's variables contradict each other or are missing."""


def rank_variables(environment: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process; None if it is no rank.

    Under srun every task is counted, also those that are to keep an engine.

    Raises:
        EnvironmentVariableError: a variable is missing or no number.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        given = {name: environment[name] for name in _VARIABLES if name in environment}
        if missing := [name for name in _VARIABLES if name not in given]:
            raise EnvironmentVariableError(f"{', '.join(missing)}: not set, though {', '.join(given)} is")
        rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if rank >= world_size:
            raise EnvironmentVariableError(f"RANK: given {rank}, allowed: less than WORLD_SIZE {world_size}")
        return given
    return _from_slurm(environment) if started_by_srun(environment) else None


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of the tasks of a job's step, and not a rank that torchrun started.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, though it is no task: only srun sets SLURM_STEP_NUM_TASKS.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment or "SLURM_PROCID" not in environment:
        return False
    return _number(environment, "SLURM_STEP_NUM_TASKS", default=1) > 1


def tasks_of_nodes(environment: Mapping[str, str]) -> list[int] | None:
    """Tasks on each node of this step; None where Slurm does not say.

    Raises:
        EnvironmentVariableError: it is no list of numbers like '4(x2),3'.
    """
    told = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if told is None:
        return None
    counts: list[int] = []
    for part in told.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise EnvironmentVariableError(f"SLURM_STEP_TASKS_PER_NODE: given '{told}', allowed: a list like 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def attempt(environment: Mapping[str, str]) -> str:
    """A name for this step of this start of this job, which all its tasks come to and no other step does."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return ".".join(str(_number(environment, name, default=0)) for name in names)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_of_this_machine(rank: int, num_ranks: int, master_port: int) -> dict[str, str]:
    """The variables of a rank whose world is all on this machine."""
    values = (rank, rank, num_ranks, "127.0.0.1", master_port)
    return {name: str(value) for name, value in zip(_VARIABLES, values, strict=True)}


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: 'gpu[003-007,9]-ib,login' -> 'gpu003-ib'. Needs no scontrol in a container."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise EnvironmentVariableError(f"SLURM_STEP_NODELIST: given '{nodelist}', allowed: a Slurm node list")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    nodelist = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise EnvironmentVariableError("SLURM_STEP_NODELIST: not set, though SLURM_PROCID is")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", default=0)
    return {
        "RANK": str(_number(environment, "SLURM_PROCID")),
        "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID")),
        "WORLD_SIZE": str(_number(environment, "SLURM_STEP_NUM_TASKS")),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodelist),
        # Every task computes the same port; jobs that share a node, and steps of one job, differ. Below 32768, where
        # Linux starts to take ports for outgoing connections.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (job * 31 + step) % 12000),
    }


def tell_exit_code(code: int) -> int:
    """Leave the code where a job script looks for it: of many ranks, the launcher's own tells only the highest."""
    if "MEGATRON_RL_ATTEMPT_LOGS" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["MEGATRON_RL_ATTEMPT_LOGS"], "exit_code").write_text(f"{code}\n")
    return code


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise EnvironmentVariableError(f"{name}: given '{value}', allowed: a number >= 0")
    return int(value)


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
        from megatron_rl.sync.engines import keep_engine

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
