"""What a task of a Slurm step finds that it is."""

import contextlib
import os
from pathlib import Path

import pytest

from megatron_rl.cli.rank_environment import (
    EnvironmentVariableError,
    attempt,
    slurm_task,
    started_by_srun,
    tasks_of_nodes,
)
from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import Config, EnginePlacement
from megatron_rl.placement.tasks import TaskPlan
from megatron_rl.rollout.hosting import FOLDER_VARIABLE
from tests.unit.cli.test_rank_environment import SRUN, TORCHRUN


def config() -> Config:
    made = Config(name="a", output_dir="runs")
    made.rollout.placement, made.rollout.num_engines = EnginePlacement.disaggregated, 1
    made.rollout.tensor_model_parallel_size = 2
    return made


def test_ranks_and_engines() -> None:
    tasks = [slurm_task(config(), SRUN | {"SLURM_PROCID": str(number)}, generates=True) for number in range(4)]
    assert [task.engine for task in tasks if task] == [None, None, 0, 0]
    assert {task.plan for task in tasks if task} == {TaskPlan(2, 1, 2)}
    assert {task.engines for task in tasks if task} == {Path("runs/a/logs/engines/1000.0.2")}
    assert {task.first_host for task in tasks if task} == {"gpu07"}


def test_an_engine_on_two_nodes_is_refused_by_every_task() -> None:
    for number in range(4):
        own = {"SLURM_PROCID": str(number), "SLURM_STEP_TASKS_PER_NODE": "3,1"}
        with pytest.raises(ConfigError, match="on two nodes"):
            slurm_task(config(), SRUN | own, generates=True)


def test_who_is_no_task() -> None:
    alone = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert [slurm_task(config(), env, generates=True) for env in ({}, TORCHRUN, SRUN | TORCHRUN, alone)] == [None] * 4
    assert [started_by_srun(env) for env in ({}, TORCHRUN, SRUN | TORCHRUN, alone, SRUN)] == [False] * 4 + [True]


def test_as_a_rank_it_is_one_of_fewer_and_ends_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    made = config()
    made.output_dir = str(tmp_path)
    task = slurm_task(made, SRUN | {"SLURM_PROCID": "1"}, generates=True)
    assert task is not None
    task.engines.mkdir(parents=True)
    with contextlib.suppress(RuntimeError), task.as_rank():
        assert (os.environ["WORLD_SIZE"], os.environ[FOLDER_VARIABLE]) == ("2", str(task.engines))
        assert not any(task.engines.iterdir())
        raise RuntimeError
    assert [file.name for file in task.engines.iterdir()] == ["ranks_ended"]


def test_no_two_attempts_have_the_same_name() -> None:
    again = SRUN | {"SLURM_RESTART_COUNT": "1"}
    other = SRUN | {"SLURM_STEP_ID": "3"}
    assert [attempt(env) for env in (SRUN, again, other)] == ["1000.0.2", "1000.1.2", "1000.0.3"]


@pytest.mark.parametrize(("told", "counts"), [("4(x2),3", [4, 4, 3]), ("1", [1]), ("2,1(x3)", [2, 1, 1, 1])])
def test_tasks_of_nodes(told: str, counts: list[int]) -> None:
    assert tasks_of_nodes({"SLURM_STEP_TASKS_PER_NODE": told}) == counts


def test_tasks_of_nodes_that_slurm_does_not_tell() -> None:
    assert tasks_of_nodes({}) is None
    with pytest.raises(EnvironmentVariableError, match="given '4 x 2', allowed: a list like"):
        tasks_of_nodes({"SLURM_STEP_TASKS_PER_NODE": "4 x 2"})
