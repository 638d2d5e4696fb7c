"""Which tasks of a job train and which are engines."""

import pytest

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import Config, EnginePlacement
from megatron_rl.placement.tasks import TaskPlan, check_nodes, engine_devices, task_plan


def config(*, tp: int = 1, num_engines: int = 1, engine_size: int = 1, apart: bool = True) -> Config:
    made = Config(name="a")
    made.parallel.tensor_model_parallel_size = tp
    made.rollout.num_engines, made.rollout.tensor_model_parallel_size = num_engines, engine_size
    made.rollout.placement = EnginePlacement.disaggregated if apart else EnginePlacement.colocated
    return made


def test_training_ranks_come_first() -> None:
    plan = task_plan(config(num_engines=2, engine_size=2), 6, generates=True)
    assert plan == TaskPlan(num_ranks=2, num_engines=2, engine_size=2)
    assert [plan.engine(task) for task in range(6)] == [None, None, 0, 0, 1, 1]
    assert [list(plan.slots(engine)) for engine in range(2)] == [[2, 3], [4, 5]]


def test_without_a_number_of_tasks_there_are_as_many_as_the_layout_needs() -> None:
    plan = task_plan(config(tp=4, num_engines=3, engine_size=2), None, generates=True)
    assert (plan.num_ranks, plan.num_tasks) == (4, 10)


def test_engines_inside_the_ranks_and_runs_without_engines_have_no_tasks_of_their_own() -> None:
    assert task_plan(config(apart=False), 4, generates=True) == TaskPlan(4)
    assert task_plan(config(num_engines=4), 4, generates=False) == TaskPlan(4)


def test_engines_that_leave_nobody_to_train_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        task_plan(config(num_engines=2, engine_size=2), 4, generates=True)
    assert str(caught.value).startswith("rollout.num_engines: given 2 of 2 tasks in a job of 4, allowed: fewer than")


@pytest.mark.parametrize(
    ("nodes", "cut"),
    [
        ([2, 4], None),
        ([4, 2], None),
        ([6], None),
        ([3, 3], "tasks 2 to 3, engine 0,"),
        ([5, 1], "tasks 4 to 5, engine 1,"),
    ],
)
def test_an_engine_lies_within_a_node(nodes: list[int], cut: str | None) -> None:
    plan = TaskPlan(num_ranks=2, num_engines=2, engine_size=2)
    if cut is None:
        check_nodes(plan, nodes)
        return
    with pytest.raises(ConfigError, match=cut):
        check_nodes(plan, nodes)


@pytest.mark.parametrize(
    ("visible", "first", "count", "devices"),
    [
        (["0", "1", "2", "3"], 2, 2, ["2", "3"]),  # an engine behind two ranks on one node
        (["4", "5", "6", "7"], 1, 1, ["5"]),  # what Slurm has left visible has its own numbers
        (["3"], 5, 1, None),  # Slurm has bound the task to its GPU
        ([], 0, 1, None),  # no GPUs
        (["0", "1"], 2, 1, None),  # too few for ranks and engines: shared
    ],
)
def test_the_gpus_of_an_engine(visible: list[str], first: int, count: int, devices: list[str] | None) -> None:
    assert engine_devices(visible, first, count) == devices
