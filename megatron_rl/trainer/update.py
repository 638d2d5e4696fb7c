"""One optimizer step on a mini-batch, and what may keep it from being made.

    forward, backward -> is the loss finite? -> gradient norm -> is it? -> do the guards let it pass? -> clip, step

A number that is not finite skips the update, stops the run or sends it back to its last checkpoint, as
`optimizer.on_non_finite` says; a guard does as it is configured (`guards.py`).
"""

import math
from collections.abc import Sequence
from functools import partial

from megatron_rl.algorithms.metrics import Metric
from megatron_rl.config.schema import Config, GuardAction, NonFinite
from megatron_rl.engine.head import Extra
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import NON_FINITE_LOSSES, LossFunction, forward_backward
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.parallel.groups import Groups, reduce_counts, reduce_metrics
from megatron_rl.runs.progress import say
from megatron_rl.runs.record import RunState
from megatron_rl.trainer.guards import GuardStop, RollBack, tripped, unknown_metrics


class NonFiniteError(RuntimeError):
    """A loss or a gradient norm was nan or infinite, and the run is configured to stop there."""


class Updates:
    """The updates of a run on this rank."""

    def __init__(self, config: Config, groups: Groups, state: RunState) -> None:
        """Args:
        config: validated.
        groups: this rank's.
        state: of the run; its record of what the guards have seen grows.
        """
        self._config, self._groups, self._state = config, groups, state
        self._named = False
        """Whether the metrics that guards name have been looked for."""
        self.flops = 0
        """Of the updates since it was last set to 0, on all ranks."""

    def make(
        self,
        model: Policy,
        optimizer: Optimizer,
        batch: MiniBatch,
        objective: LossFunction,
        *,
        temperature: float = 1.0,
        extras: Sequence[Extra] = (),
        guarded: bool = False,
    ) -> dict[str, Metric]:
        """One update; its metrics, {} on ranks that do not report. Collective.

        Args:
            temperature, extras: see `forward_backward`.
            guarded: the guards of the configuration watch it.

        Raises:
            NonFiniteError, GuardStop, RollBack: it was not made, and the run does not go on from here.
        """
        self.flops += model.sizes.training_flops(batch.lengths)
        optimizer.zero_grad()
        with model.routing.replaying():
            metrics = forward_backward(model, batch.rows, objective, temperature=temperature, extras=extras)
        bad_losses = metrics.pop(NON_FINITE_LOSSES).value if metrics else 0.0
        (bad_losses,) = reduce_counts([bad_losses], self._groups.world)
        accepts = partial(self._accepts, metrics) if guarded and self._config.guards else None
        update = optimizer.step(loss_is_finite=not bad_losses, accepts=accepts)
        if not update.finite:
            self._on_non_finite(update.grad_norm, bad_losses)
        if not self._groups.reports:
            return {}
        return metrics | {
            "optim/grad_norm": Metric("max", update.grad_norm if update.finite else math.nan),
            "optim/lr": Metric("max", update.lr),
            "optim/skipped_updates": Metric("sum", 0.0 if update.made else 1.0 / self._groups.dp.size()),
        }

    def _on_non_finite(self, grad_norm: float, bad_losses: float) -> None:
        what = f"the gradient norm is {grad_norm}, and the loss of {bad_losses:g} rows is not finite"
        if self._config.optimizer.on_non_finite is NonFinite.rollback:
            raise RollBack(what)
        if self._config.optimizer.on_non_finite is NonFinite.stop:
            raise NonFiniteError(
                f"step {self._state.step + 1}: {what}; nothing was updated. "
                "optimizer.on_non_finite=skip goes on without such updates"
            )

    def _accepts(self, metrics: dict[str, Metric], grad_norm: float) -> bool:
        """Whether the guards let an update pass; collective."""
        reported = reduce_metrics(metrics if self._groups.reports else {}, self._groups.world)
        metrics_of_guards = reported | {"optim/grad_norm": grad_norm}
        if not self._named and (line := unknown_metrics(self._config.guards, metrics_of_guards)):
            self._named = True
            raise GuardStop(line)
        self._named = True
        trip = tripped(self._config.guards, metrics_of_guards, self._state.past)
        if trip is None:
            return True
        action, reason = trip
        reason = f"step {self._state.step + 1}: {reason}"
        if action is GuardAction.rollback:
            raise RollBack(reason)
        if action is GuardAction.stop:
            raise GuardStop(f"{reason}; nothing was updated. The guard of this metric says stop")
        if self._groups.world.rank() == 0:
            say(f"{reason}; the update is skipped")
        return False
