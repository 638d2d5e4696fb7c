"""Guards: what is done when a number of an update is not what it should be.

A guard watches one metric of the policy's updates, before the update is made: the loss, the gradient norm, a KL, the
mismatch between engine and trainer. Over its limit (`above`), or far from its own recent past (`above_deviations`), the
update is skipped, the run stops, or it goes back to its last checkpoint and on with the data that follow. A number that
is not finite is over every limit.

What the past was is part of the run's state, so a resumed run judges as an uninterrupted one would.

The convergence monitor of a run, in metrics; its window outlives a restart.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from megatron_rl.algorithms.diagnostics import ConvergenceMonitor
from megatron_rl.config.errors import UserError
from megatron_rl.config.functions import nearest
from megatron_rl.config.schema import ConvergenceConfig, GuardAction, GuardConfig
from megatron_rl.runs.record import RunState

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
