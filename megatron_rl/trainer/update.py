"""One optimizer step on a mini-batch, and what may keep it from being made: numbers that are not finite, and guards.

    forward, backward -> is the loss finite? -> gradient norm -> is it? -> do the guards let it pass? -> clip, step

A number that is not finite skips the update, stops the run or sends it back to its last checkpoint, as
`optimizer.on_non_finite` says.

A guard watches one metric of the policy's updates, before the update is made: the loss, the gradient norm, a KL, the
mismatch between engine and trainer. Over its limit (`above`), or far from its own recent past (`above_deviations`), the
update is skipped, the run stops, or it goes back to its last checkpoint and on with the data that follow. A number that
is not finite is over every limit.

The past of a guard, and the window of the convergence monitor, are part of the run's state, so a resumed run decides as
an uninterrupted one would.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from megatron_rl.algorithms.diagnostics import ConvergenceMonitor
from megatron_rl.algorithms.metrics import Metric
from megatron_rl.config.errors import UserError
from megatron_rl.config.functions import nearest
from megatron_rl.config.schema import Config, ConvergenceConfig, GuardAction, GuardConfig, NonFinite
from megatron_rl.engine.head import Extra
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import NON_FINITE_LOSSES, LossFunction, forward_backward
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.parallel.groups import Groups, reduce_counts, reduce_metrics
from megatron_rl.runs.progress import say
from megatron_rl.runs.record import RunState


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
            metrics = forward_backward(model, batch.micro_batches, objective, temperature=temperature, extras=extras)
        bad_losses = metrics.pop(NON_FINITE_LOSSES).result() if metrics else 0.0
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
        what = f"the gradient norm is {grad_norm}, and the loss of {bad_losses:g} micro-batches is not finite"
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


_MIN_PAST = 5
"""Values before a deviation from them means anything."""


class GuardStop(UserError):
    """A guard has ended the run."""


class RollBack(Exception):
    """The run is to go back to its last checkpoint. The message says why."""


def tripped(
    guards: Sequence[GuardConfig], metrics: Mapping[str, float], past: dict[str, list[float]]
) -> tuple[GuardAction, str] | None:
    """The action of the first guard that trips, and why; the past is extended by what trips no guard.

    Args:
        guards: in the order of the configuration.
        metrics: of an update, equal on all ranks.
        past: values of earlier updates by metric, oldest first; changed.
    """
    for guard in guards:
        value = metrics.get(guard.metric)
        if value is None:
            continue
        if (reason := _reason(guard, value, past.get(guard.metric, []))) is not None:
            return guard.action, f"{guard.metric} is {value:.6g}, {reason}"
    for guard in guards:
        if guard.above_deviations is not None and guard.metric in metrics:
            past[guard.metric] = [*past.get(guard.metric, []), float(metrics[guard.metric])][-guard.window :]
    return None


def unknown_metrics(guards: Sequence[GuardConfig], metrics: Mapping[str, float]) -> str | None:
    """A line about the first guard whose metric no update has; None: each watches something."""
    for number, guard in enumerate(guards):
        if guard.metric not in metrics:
            return f"guards[{number}].metric: no update has {guard.metric!r}{nearest(guard.metric, sorted(metrics))}"
    return None


def _reason(guard: GuardConfig, value: float, past: Sequence[float]) -> str | None:
    if not math.isfinite(value):
        return "not a finite number"
    if guard.above is not None and value > guard.above:
        return f"above {guard.above:g}"
    if guard.above_deviations is not None and len(past) >= _MIN_PAST:
        mean, deviation = statistics.fmean(past), statistics.pstdev(past)
        # A past that hardly varies would trip on rounding: a hundredth of the mean is no spike.
        limit = mean + guard.above_deviations * max(deviation, 0.01 * abs(mean))
        if value > limit:
            return f"above {limit:.6g}, {guard.above_deviations:g} deviations over the mean of {len(past)} updates"
    return None


KEY = "convergence"


def convergence_metrics(metrics: dict[str, float], config: ConvergenceConfig, state: RunState) -> dict[str, float]:
    """convergence/{loss_variance, policy_change, converged} over the last steps; {} where no policy was updated.

    A single update per step is made at ratio 1, where the policy has not moved yet: then there is no policy_change, and
    nothing is said to have converged.
    """
    if "policy/loss" not in metrics:
        return {}
    monitor = ConvergenceMonitor(
        window=config.window, loss_variance=config.loss_variance, policy_change=config.policy_change
    )
    if KEY in state.adaptive:
        monitor.load(state.adaptive[KEY])
    found = monitor.add(metrics["policy/loss"], metrics["policy/change_mean"] or None)
    state.adaptive[KEY] = monitor.state()
    return found
