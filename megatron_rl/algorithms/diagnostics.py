"""Whether training has converged, how far a step moved the policy, and how far engine and trainer disagree.

A common test of convergence is a small variance of the policy loss over a window. It is here, with a warning: the value
of a policy-gradient loss is no measure of progress. On-policy the ratio is 1, and the loss is minus the mean
advantage, which is 0 for any group-relative advantage at every step of the run, good or bad. So the monitor also wants
the policy to have stopped moving, and what has converged is to be read from the reward.

The mismatch is between the engine that sampled and the model that trains, of the same tokens under the same weights.
Two implementations of one model (kernels, dtypes, batch shapes) give different log-probs; what is meant to be on-policy
then is not, and a growing difference precedes collapse. These metrics are always on.
"""

from collections import deque

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from megatron_rl.algorithms.metrics import Metric, masked_max, masked_mean


class ConvergenceMonitor:
    """Variance of the policy loss and mean policy change over the last steps."""

    def __init__(self, *, window: int, loss_variance: float, policy_change: float) -> None:
        """Args:
        window: steps that are looked at, >= 2.
        loss_variance: population variance of the loss below which it counts as stable.
        policy_change: mean change per step, nats, below which the policy counts as at rest; see
        `policy_change_metrics`.
        """
        if window < 2:
            raise ValueError(f"window is {window}; must be at least 2 steps")
        self.limits = (loss_variance, policy_change)
        self.losses: deque[float] = deque(maxlen=window)
        self.changes: deque[float] = deque(maxlen=window)

    def add(self, policy_loss: float, policy_change: float | None) -> dict[str, float]:
        """Take in one step; None for a change that could not be seen.

        Returns:
            convergence/loss_variance, and convergence/policy_change if any was seen: over the window so far; and
            convergence/converged: 1 when the window is full, of both, and both are below their limits.
        """
        self.losses.append(policy_loss)
        if policy_change is not None:
            self.changes.append(policy_change)
        mean = sum(self.losses) / len(self.losses)
        variance = sum((loss - mean) ** 2 for loss in self.losses) / len(self.losses)
        found = {"convergence/loss_variance": variance, "convergence/converged": 0.0}
        if self.changes:
            change = found["convergence/policy_change"] = sum(self.changes) / len(self.changes)
            full = len(self.losses) == len(self.changes) == self.losses.maxlen
            found["convergence/converged"] = float(full and variance < self.limits[0] and change < self.limits[1])
        return found

    def state(self) -> dict[str, list[float]]:
        """For the checkpoint."""
        return {"losses": list(self.losses), "changes": list(self.changes)}

    def load(self, state: dict[str, list[float]]) -> None:
        """Go on from a checkpoint's state; of a longer window its last steps are kept."""
        for kept, saved in ((self.losses, state["losses"]), (self.changes, state["changes"])):
            kept.clear()
            kept.extend(saved)


@torch.no_grad()
def policy_change_metrics(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> dict[str, Metric]:
    """How far the policy of a step is from the one before it, on sampled tokens.

    Args:
        log_probs, old_log_probs: [T] float32, nats.
        mask: [T], 1 for the tokens that count; masked tokens may hold anything.

    Returns:
        policy/change_mean, policy/change_max: of |log_probs - old_log_probs|, nats.
    """
    change = (log_probs.double() - old_log_probs.double()).abs()
    return {"policy/change_mean": masked_mean(change, mask), "policy/change_max": masked_max(change, mask)}


@torch.no_grad()
def mismatch_metrics(log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, Metric]:
    """Differences of two log-probs of the same sampled tokens; float64, d_t = log_probs_t - rollout_log_probs_t.

    Args:
        log_probs: [T] float32, nats. The training model's, before its first update.
        rollout_log_probs: [T] float32, nats. The engine's, which sampled the tokens.
        mask: [T], 1 for sampled tokens, else 0; masked tokens may hold anything.

    Returns:
        mismatch/log_prob_abs_diff_mean, mismatch/log_prob_abs_diff_max: of |d_t|, nats.
        mismatch/token_mult_prob_error: mean of exp(|d_t|), the factor between the two probabilities; 1 is agreement.
            NeMo-RL reports it by this name. |d_t| is bounded by `kl.MAX_LOG_RATIO` before exp.
        mismatch/kl: mean k3 estimate of KL(rollout || policy), nats, >= 0.
    """
    policy, rollout = log_probs.double(), rollout_log_probs.double()
    abs_diff = (policy - rollout).abs()
    return {
        "mismatch/log_prob_abs_diff_mean": masked_mean(abs_diff, mask),
        "mismatch/log_prob_abs_diff_max": masked_max(abs_diff, mask),
        "mismatch/token_mult_prob_error": masked_mean(abs_diff.clamp(max=MAX_LOG_RATIO).exp(), mask),
        # The engine sampled, so it takes the place of `log_probs`. Rounding may leave k3 at -1e-17.
        "mismatch/kl": masked_mean(kl_estimate(rollout, policy, "k3").clamp(min=0), mask),
    }
