"""How far the engine that sampled and the model that trains disagree about the same tokens under the same weights.

Two implementations of one model (kernels, dtypes, batch shapes) give different log-probs; what is meant to be on-policy
then is not, and a growing difference precedes collapse. These metrics are always on.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from megatron_rl.algorithms.metrics import Metric, masked_max, masked_mean


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
