"""Clipped surrogates of a completion's ratio: of its probability (PPO per trajectory), or the mean per token (GSPO).

PPO's and GRPO's ratio is printed per completion at times. The papers of both take it per token (`policy_loss`); a
reward for the whole completion asks for the ratio of the whole, whose spread grows with length, and GSPO's geometric
mean is the one that has the same scale at every length.

Every function returns one value per token, the same on all tokens of a completion, so that any aggregation applies;
`sequence_mean_token_mean` makes of it the mean over completions that the papers print. They see whole sequences: under
context parallelism gather the row's log-probs first. `ppo_clip_metrics` describes them when it is given the log-ratios
of `importance.log_ratios` and zeros for the old policy.
"""

from torch import Tensor

from megatron_rl.algorithms.importance import log_ratios
from megatron_rl.algorithms.policy_loss import ppo_clip_loss


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate of the geometric-mean ratio of a completion, on each of its tokens; to be minimised.

        L_t = -min(s A_t, clip(s, 1 - clip_low, 1 + clip_high) A_t)
        s = exp(mean over i of log_probs_i - old_log_probs_i)

    Its gradient is shared by the completion: token t of n trained ones gets -s sum_j w_j A_j / n from the unclipped
    tokens j, with w_j the weights of the aggregation. Bounds are far narrower than PPO's: the paper has 3e-4 and 4e-4.

    Source: GSPO, arXiv:2507.18071, eq. 5 and 7.

    Args:
        log_probs: [T] float32, nats. Carries the gradient.
        old_log_probs: [T] float32, nats. Constant in the gradient.
        advantages: [T] float32, one value per completion. Constant in the gradient.
        loss_mask: [T], 1 for trained tokens, else 0; masked tokens may hold anything.
        cu_seqlens: [S + 1] int32.
        clip_low, clip_high: half-widths of the trust region of s, dimensionless.
        dual_clip: as in `ppo_clip_loss`.

    Returns:
        [T] in log_probs' dtype, before mask and division (`aggregation`). Where a trained token of the completion is
        nan or infinite, all its tokens are nan, with gradient 0.
    """
    ratios = log_ratios(log_probs, old_log_probs, loss_mask, cu_seqlens, level="geometric")
    return _clipped(ratios, advantages, clip_low, clip_high, dual_clip)


def gspo_token_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """GSPO for advantages that differ between the tokens of a completion; to be minimised.

        L_t = -min(s_t A_t, clip(s_t, 1 - clip_low, 1 + clip_high) A_t)
        s_t = sg(s) exp(log_probs_t - sg(log_probs_t))

    The value and the clip are the completion's, the gradient is the token's own. With one advantage per completion it
    is `gspo_loss` in value, and in gradient too when the tokens of a completion have equal weights.

    Source: GSPO, arXiv:2507.18071, eq. 13 and 14. Arguments and result as `gspo_loss`.
    """
    shared = log_ratios(log_probs, old_log_probs, loss_mask, cu_seqlens, level="geometric").detach()
    return _clipped(shared + (log_probs - log_probs.detach()), advantages, clip_low, clip_high, dual_clip)


def ppo_trajectory_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate of the ratio of whole completions, on each of its tokens; to be minimised.

        L_t = -min(R A_t, clip(R, 1 - clip_low, 1 + clip_high) A_t)
        R = exp(sum over i of log_probs_i - old_log_probs_i)

    R is the unbiased weight of a completion, and the noisiest: with a spread of 0.1 nats per token it leaves [0.8, 1.2]
    within a few tokens. With the weights of `sequence_mean_token_mean` the gradient of each token is -R A /
    num_sequences.

    Source: the action of PPO, arXiv:1707.06347, eq. 7, taken to be the completion. Arguments and result as `gspo_loss`.
    """
    ratios = log_ratios(log_probs, old_log_probs, loss_mask, cu_seqlens, level="sequence")
    return _clipped(ratios, advantages, clip_low, clip_high, dual_clip)


def _clipped(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    return ppo_clip_loss(
        log_ratio,
        log_ratio.new_zeros(()),
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
