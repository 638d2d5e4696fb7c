"""Policy-gradient losses: the clipped surrogate (PPO), those without a trust region, and those of a completion's ratio.

All return one loss per token; masks and the division belong to `aggregation`. A `..._metrics` function describes the
same tokens without a gradient.

`ppo_clip_loss`, with separate bounds and the dual clip (a third bound, not the two sides of the ordinary clip). It does
not bound the ratio: outside the region the gradient of a token is 0, but its step overshoots, other tokens'
gradients move it on, and nothing pulls it back (tests/theory). Nor is the gradient 0 outside the region on both sides:
it is so only where the advantage pushes outwards. Where it is not clipped the gradient is r A grad log pi, and where it
is clipped 0, never min(r A, clip(r) A) grad log pi, as it is printed at times. It is a biased estimate then, and no
guarantee of monotonic improvement is left.

`reinforce_loss`, `importance_weighted_loss`, `cispo_loss`. REINFORCE, REINFORCE with a baseline, RLOO, REINFORCE++ and
A2C are one loss; they differ in what the `advantages` are. A gradient is right at one point, the policy that sampled:
these losses are for one update per batch, or need the importance weight.

`gspo_loss`, `gspo_token_loss`, `ppo_trajectory_loss`: clipped surrogates of a completion's ratio. PPO's and GRPO's is
printed per completion at times; the papers of both take it per token. A reward for the whole completion asks for the
ratio of the whole, whose spread grows with length, and GSPO's geometric mean is the one that has the same scale at
every length. The value is the same on all tokens of a completion, so that any aggregation applies;
`sequence_mean_token_mean` makes of it the mean over completions that the papers print. They see whole sequences: under
context parallelism gather the micro-batch's log-probs first. `ppo_clip_metrics` describes them when it is given the
log-ratios of `importance.log_ratios` and zeros for the old policy.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.importance import log_ratios
from megatron_rl.algorithms.kl import MAX_LOG_RATIO, kl_estimate
from megatron_rl.algorithms.metrics import Metric, masked_max, masked_mean, masked_min
from megatron_rl.algorithms.non_finite import finite_inputs, nan_where_not


def ppo_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Tensor:
    """Per-token clipped surrogate of PPO, to be minimised.

        L_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),   r_t = exp(log_probs_t - old_log_probs_t)
        L_t = min(L_t, -dual_clip A_t)   where A_t < 0, if dual_clip is given

    The minimum leaves a bad token (A_t < 0) that became far more probable with a loss and a gradient without bound; the
    dual clip bounds the loss by dual_clip |A_t|. The log-ratio is bounded above by `kl.MAX_LOG_RATIO` (20 nats), which
    changes neither value nor gradient below it.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; separate bounds: DAPO, arXiv:2503.14476; dual clip: Ye et
    al. 2019, arXiv:1912.09729.

    Args:
        log_probs: [T] float32, nats. Current policy; carries the gradient.
        old_log_probs: [T] float32, nats. Policy on which the trust region is centred; constant in the gradient.
        advantages: [T] float32. Constant in the gradient.
        clip_low, clip_high: half-widths of the trust region of the ratio, dimensionless.
        dual_clip: bound of the loss in units of |A_t|, > 1; None: no bound.

    Returns:
        [T] in log_probs' dtype, before mask and division (`aggregation`). Where an input is nan or infinite the value
        is nan and the gradient 0: a masked token cannot reach the parameters, an unmasked one cannot pass unseen.

    Raises:
        ValueError: dual_clip <= 1, which would silence bad tokens inside the trust region.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}; must be greater than 1, or null for none")
    log_ratio = log_probs - old_log_probs.detach()
    advantages = advantages.detach()
    finite = torch.isfinite(log_ratio) & torch.isfinite(advantages)
    # This `where` gives the log-ratio a gradient of 0 where the products below would make it 0 * nan.
    ratio = torch.where(finite, log_ratio, 0.0).clamp(max=MAX_LOG_RATIO).exp()
    losses = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return torch.where(finite, losses, torch.nan)


@torch.no_grad()
def ppo_clip_metrics(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> dict[str, Metric]:
    """How far the policy moved from old_log_probs' policy, and how many tokens the clip silenced; float64.

    Args:
        log_probs, old_log_probs, advantages, clip_low, clip_high, dual_clip: as in `ppo_clip_loss`.
        mask: [T], 1 for the tokens that count, else 0; masked tokens may hold anything.

    Returns:
        policy/approx_kl: mean k3 estimate of KL(old || new), nats; exactly 0 where the policies are equal.
        policy/ratio_max, policy/ratio_min: extremes of new / old; the maximum shows at most exp(`kl.MAX_LOG_RATIO`).
        policy/clip_fraction: tokens whose gradient the clip makes 0. It is the sum of its disjoint parts _low (A < 0,
            ratio below the region), _high (A > 0, ratio above it) and _dual (A < 0, ratio above dual_clip).
    """
    new, old = log_probs.double(), old_log_probs.double()
    ratio = (new - old).clamp(max=MAX_LOG_RATIO).exp()
    low = (advantages < 0) & (ratio < 1 - clip_low)
    high = (advantages > 0) & (ratio > 1 + clip_high)
    dual = (advantages < 0) & (ratio > (torch.inf if dual_clip is None else dual_clip))
    # The tokens were sampled by the old policy, so it takes the place of `log_probs`. Rounding may leave k3 at -1e-17.
    approx_kl = kl_estimate(old, new, "k3").clamp(min=0)
    return {
        "policy/approx_kl": masked_mean(approx_kl, mask),
        "policy/ratio_max": masked_max(ratio, mask),
        "policy/ratio_min": masked_min(ratio, mask),
        "policy/clip_fraction": masked_mean((low | high | dual).double(), mask),
        "policy/clip_fraction_low": masked_mean(low.double(), mask),
        "policy/clip_fraction_high": masked_mean(high.double(), mask),
        "policy/clip_fraction_dual": masked_mean(dual.double(), mask),
    }


def reinforce_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Per-token REINFORCE, to be minimised: L_t = -A_t log_probs_t. Its value means nothing; its gradient does.

    Source: Williams 1992, doi:10.1007/BF00992696; as the actor of A2C: Mnih et al. 2016, arXiv:1602.01783.

    Args:
        log_probs: [T] float32, nats. Of the policy that sampled; carries the gradient, -A_t.
        advantages: [T] float32. Constant in the gradient.

    Returns:
        [T] in log_probs' dtype, before mask and division (`aggregation`); nan with gradient 0 where an input is not
        finite.
    """
    finite, (log_probs, advantages) = finite_inputs(log_probs, advantages.detach())
    return nan_where_not(finite, -advantages * log_probs)


def importance_weighted_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Per-token surrogate without a clip, to be minimised: L_t = -r_t A_t, r_t = exp(log_probs_t - old_log_probs_t).

    Under samples of the old policy its gradient is unbiased for actions, given their states; over a whole completion
    the product of the ratios would be needed. At r = 1 it is REINFORCE, bit for bit in the gradient. Nothing bounds it.

    Source: Schulman et al. 2015, arXiv:1502.05477, eq. 14 (the objective of TRPO, without its constraint).

    Args:
        log_probs: [T] float32, nats. Carries the gradient, -r_t A_t.
        old_log_probs: [T] float32, nats. Of the policy that sampled; constant in the gradient.
        advantages: [T] float32. Constant in the gradient.

    Returns:
        [T] as `reinforce_loss`. The log-ratio is bounded above by `kl.MAX_LOG_RATIO`.
    """
    finite, (log_ratio, advantages) = finite_inputs(log_probs - old_log_probs.detach(), advantages.detach())
    return nan_where_not(finite, -log_ratio.clamp(max=MAX_LOG_RATIO).exp() * advantages)


def cispo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Per-token CISPO, to be minimised: the importance *weight* is clipped, and no token loses its gradient.

        L_t = -sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t log_probs_t,   r_t = exp(log_probs_t - old_log_probs_t)

    PPO's clip silences rare tokens that a first update made likely, often those that turn a chain of thought ("wait");
    here they go on learning with the bounded weight. MiniMax uses no lower bound: clip_low 1 is that.

    Source: MiniMax-M1, arXiv:2506.13585, eq. 4 and 5.

    Args:
        log_probs: [T] float32, nats. Carries the gradient, -clip(r_t) A_t.
        old_log_probs: [T] float32, nats. Constant in the gradient.
        advantages: [T] float32. Constant in the gradient.
        clip_low, clip_high: bounds of the weight around 1, dimensionless, >= 0.

    Returns:
        [T] as `reinforce_loss`.
    """
    finite, (log_probs, log_ratio, advantages) = finite_inputs(
        log_probs, (log_probs - old_log_probs).detach(), advantages.detach()
    )
    weights = log_ratio.clamp(max=MAX_LOG_RATIO).exp().clamp(1 - clip_low, 1 + clip_high)
    return nan_where_not(finite, -weights * advantages * log_probs)


@torch.no_grad()
def cispo_metrics(
    log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> dict[str, Metric]:
    """How many weights the clip bounds; unlike in PPO, their tokens still learn.

    Returns:
        policy/clip_fraction, its parts _low and _high, and policy/ratio_min and _max, as in `ppo_clip_metrics`.
    """
    ratio = (log_probs.double() - old_log_probs.double()).clamp(max=MAX_LOG_RATIO).exp()
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return {
        "policy/ratio_max": masked_max(ratio, mask),
        "policy/ratio_min": masked_min(ratio, mask),
        "policy/clip_fraction": masked_mean((low | high).double(), mask),
        "policy/clip_fraction_low": masked_mean(low.double(), mask),
        "policy/clip_fraction_high": masked_mean(high.double(), mask),
    }


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
