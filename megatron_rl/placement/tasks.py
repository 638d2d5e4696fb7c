"""The tasks of a job: the training ranks first, then the engines with processes of their own.

    2 ranks and 2 engines of 2 slots, on nodes of 2 and 4 tasks:

    node   0 0 | 1 1 1 1
    task   0 1 | 2 3 4 5
    does   r r | E e E e      E starts its engine's server and restarts it; e only provides its slot, a GPU

Tasks are numbered along the nodes, so whole nodes of either kind are a matter of their sizes. An engine lies within one
node. Engines inside the training ranks have no tasks. Arithmetic alone, for job scripts, launchers and the tasks
themselves, which all come to the same plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import Config, EnginePlacement
from megatron_rl.config.world import data_parallel_size, replica_ranks


@dataclass(frozen=True)
class TaskPlan:
    """The tasks of a job."""

    num_ranks: int
    """Training ranks: tasks 0, 1, ..."""
    num_engines: int = 0
    """Engines with tasks of their own."""
    engine_size: int = 1
    """Tasks of an engine."""

    @property
    def num_tasks(self) -> int:
        """All of them."""
        return self.num_ranks + self.num_engines * self.engine_size

    def slots(self, engine: int) -> range:
        """Tasks of an engine; the first one starts it."""
        assert 0 <= engine < self.num_engines
        first = self.num_ranks + engine * self.engine_size
        return range(first, first + self.engine_size)

    def engine(self, task: int) -> int | None:
        """Number of the engine that a task belongs to; None: it is a training rank."""
        assert 0 <= task < self.num_tasks
        return None if task < self.num_ranks else (task - self.num_ranks) // self.engine_size


def task_plan(config: Config, num_tasks: int | None, *, generates: bool) -> TaskPlan:
    """The plan of a configuration.

    Args:
        config: yet to be validated, for the number of ranks that this says.
        num_tasks: that a job has; None: as many as the layout needs.
        generates: whether the run has engines.

    Raises:
        ConfigError: the engines leave no task to train.
    """
    rollout = config.rollout
    apart = generates and rollout.placement is EnginePlacement.disaggregated
    num_engines, size = (rollout.num_engines, rollout.tensor_model_parallel_size) if apart else (0, 1)
    if num_tasks is None:
        return TaskPlan(replica_ranks(config.parallel) * data_parallel_size(config.parallel, None), num_engines, size)
    if num_tasks <= num_engines * size:
        raise ConfigError(
            f"rollout.num_engines: given {num_engines} of {size} tasks in a job of {num_tasks}, allowed: fewer than "
            "the tasks, the rest of which train"
        )
    return TaskPlan(num_tasks - num_engines * size, num_engines, size)


def check_nodes(plan: TaskPlan, tasks_of_nodes: Sequence[int]) -> None:
    """Refuse a job that would cut an engine in two.

    Args:
        plan: of as many tasks.
        tasks_of_nodes: number of tasks on each node, in order.

    Raises:
        ConfigError: an engine lies on more than one node.
    """
    node_of_task = [node for node, count in enumerate(tasks_of_nodes) for _ in range(count)]
    assert len(node_of_task) == plan.num_tasks
    for engine in range(plan.num_engines):
        slots = plan.slots(engine)
        if node_of_task[slots[0]] != node_of_task[slots[-1]]:
            raise ConfigError(
                f"rollout.tensor_model_parallel_size: given {plan.engine_size}, which puts tasks {slots[0]} to "
                f"{slots[-1]}, engine {engine}, on two nodes, allowed: sizes that end with a node"
            )


def engine_devices(visible: Sequence[str], first: int, count: int) -> list[str] | None:
    """The GPUs of an engine.

    Args:
        visible: those that its process sees.
        first: number of its first slot on the node.
        count: its slots.

    Returns:
        `count` of them; None where all that are visible are its own already, or they are too few to be divided so.
    """
    if len(visible) <= count or first + count > len(visible):
        return None
    return list(visible[first : first + count])
