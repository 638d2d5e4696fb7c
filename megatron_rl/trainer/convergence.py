"""The convergence monitor of a run, in metrics; its window outlives a restart."""

from megatron_rl.algorithms.diagnostics import ConvergenceMonitor
from megatron_rl.config.schema import ConvergenceConfig
from megatron_rl.trainer.run_state import RunState

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
