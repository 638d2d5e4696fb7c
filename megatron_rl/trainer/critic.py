"""The critic of an actor-critic run: a value per token, fitted to the returns of each step by an optimizer of its own.

Its backbone is separate from the policy's, on the same ranks and rows, with other weights (a shared one is in
`engine/actor_critic.py`). Before the first update of a step it values the tokens of all rows; from these values come
the advantages, the returns that it is fitted to, and the bounds of its clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rl.config.schema import Config
from megatron_rl.data.packing import PackedRow
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.scalar_model import ScalarModel
from megatron_rl.engine.step import forward_values
from megatron_rl.parallel.groups import Groups


@dataclass(frozen=True)
class Critic:
    """A value function and what trains it."""

    model: ScalarModel
    optimizer: Optimizer

    def add_values(self, rows: Sequence[PackedRow]) -> None:
        """Give the rows `values`, [T], of the critic as it is now."""
        for row, values in zip(rows, forward_values(self.model, rows), strict=True):
            row.per_token["values"] = values


def build_critic(config: Config, groups: Groups, *, num_steps: int) -> Critic:
    """The critic of a run as it starts.

    Args:
        num_steps: optimizer steps of the whole run.
    """
    settings = config.algorithm.critic
    model = ScalarModel(
        replace(config.model, hf_path=settings.hf_path or config.model.hf_path),
        groups,
        config.parallel,
        per_token=True,
        use_distributed_optimizer=settings.optimizer.use_distributed_optimizer,
    )
    return Critic(model, Optimizer(settings.optimizer, model, num_steps=num_steps))
