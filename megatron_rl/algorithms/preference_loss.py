"""Losses on preference data: of policies on pairs (DPO, IPO, SimPO, ORPO, the general form) and on single completions
(KTO); of reward models on pairs (Bradley-Terry), on steps (process) and on scores (regression).

Policies. All take log-probs of whole completions, one number each: the sum over the completion's tokens
(`aggregation.sequence_sums`), or their mean where a loss says average, or where a length-averaged DPO or IPO is wanted
(`aggregation.sequence_means` of policy and reference alike; beta then is per token, some hundred times larger). They
return one value per pair or completion, to be divided by the pairs of the global batch.

With margin m = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l)), for a preferred w and a rejected l:

    DPO     -log sigmoid(beta m)              IPO     (m - 1 / (2 tau))^2
    hinge   max(0, 1 - beta m)  (SLiC)        any     f(m), convex and falling at 0 (`margin_loss`)

The last line is often called Psi-PO. In the paper of IPO (Azar et al., arXiv:2310.12036) Psi-PO is another thing:
max over pi of E[Psi(p(y > y'))] - tau KL(pi || ref), with Psi a function of the *preference*; IPO is Psi = identity and
DPO's optimum that of Psi = logit. Losses f of the *margin* are the GPO of Tang et al., arXiv:2402.05749.

The weight in DPO's gradient is sigmoid(-beta m), large where the pair is ranked wrongly and small where it is settled
(not sigmoid(beta m), as it is printed at times). An SFT term, `sft_loss` on the chosen completions, has a coefficient
of its own: beta is the temperature and no weight.

Reward models. A Bradley-Terry reward is determined up to a constant per prompt, and its scale is that of log-odds. Any
monotonic transformation of a reward ranks alike, but a policy trained on it is another one, for its probabilities are
proportional to ref exp(reward / beta): only the constant is free.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_rl.algorithms.metrics import Metric, masked_mean
from megatron_rl.algorithms.non_finite import finite_inputs, nan_where_not


def implicit_rewards(log_probs: Tensor, ref_log_probs: Tensor, *, beta: float) -> Tensor:
    """Reward that a policy is optimal for, up to a constant of the prompt: beta (log pi(y) - log ref(y)).

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 5 without beta log Z(x).

    Args:
        log_probs: [N] float32, nats, of whole completions. May carry a gradient.
        ref_log_probs: [N] float32, nats. Constant in the gradient.
        beta: strength of the KL, nats to reward.

    Returns:
        [N], in units of reward.
    """
    return beta * (log_probs - ref_log_probs.detach())


def margin_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, f: Callable[[Tensor], Tensor]
) -> Tensor:
    """The general form: f of the margin m of log-ratios, to be minimised; see this module's docstring.

    Args:
        chosen, rejected: [P] float32, nats. Log-probs of the pairs' completions; they carry the gradient.
        ref_chosen, ref_rejected: [P] float32, nats. Of the reference; constant in the gradient. Zeros: no reference.
        f: margins [P], nats, finite -> losses [P].

    Returns:
        [P] in chosen's dtype; nan with gradient 0 where an input is not finite.
    """
    finite, (margin,) = finite_inputs((chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach()))
    return nan_where_not(finite, f(margin))


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation, per pair, to be minimised.

        L = -(1 - eps) log sigmoid(beta m) - eps log sigmoid(-beta m)

    Its minimum over all policies, for preferences of a Bradley-Terry model with reward r, is ref exp(r / beta) / Z. At
    pi = ref it is ln 2. eps > 0 is the conservative form: labels are wrong with probability eps, and m stays finite.
    d L / d chosen = -beta ((1 - eps) sigmoid(-beta m) - eps sigmoid(beta m)).

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing: Mitchell 2023, ericmitchell.ai/cdpo.pdf.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: as in `margin_loss`.
        beta: inverse temperature of the margin, > 0.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        [P] as `margin_loss`.

    Raises:
        ValueError: label_smoothing outside its range.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; must be in [0, 0.5)")

    def logistic(margin: Tensor) -> Tensor:
        right, wrong = functional.logsigmoid(beta * margin), functional.logsigmoid(-beta * margin)
        return -(1 - label_smoothing) * right - label_smoothing * wrong

    return margin_loss(chosen, rejected, ref_chosen, ref_rejected, f=logistic)


def ipo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, tau: float) -> Tensor:
    """Identity preference optimisation, per pair, to be minimised: L = (m - 1 / (2 tau))^2.

    The margin is driven to a finite value however certain the preference is. Over all policies and the pairs of p(y >
    y'), the minimum is ref exp(p(y > mu) / tau) / Z, p(y > mu) being the chance that y beats a draw of the pairs'
    policy mu.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: as in `margin_loss`.
        tau: strength of the regularisation, > 0.

    Returns:
        [P] as `margin_loss`, nats squared.
    """
    return margin_loss(chosen, rejected, ref_chosen, ref_rejected, f=lambda m: (m - 1 / (2 * tau)).square())


def hinge_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> Tensor:
    """Hinge on the margin, per pair, to be minimised: L = max(0, 1 - beta m).

    Source: SLiC-HF, arXiv:2305.10425, in the normalised form of arXiv:2309.06657, eq. 9. Arguments as `dpo_loss`.
    """
    return margin_loss(chosen, rejected, ref_chosen, ref_rejected, f=lambda m: (1 - beta * m).clamp(min=0))


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Simple preference optimisation, per pair, to be minimised; it has no reference.

        L = -log sigmoid(beta (a_w - a_l) - gamma),   a = mean log-prob of a completion's tokens

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.

    Args:
        chosen, rejected: [P] float32, nats per token. *Mean* log-probs; carry the gradient.
        beta: scale, > 0.
        gamma: margin of the rewards, >= 0.

    Returns:
        [P] as `margin_loss`.
    """
    none = torch.zeros_like(chosen)
    return margin_loss(chosen, rejected, none, none, f=lambda m: -functional.logsigmoid(beta * m - gamma))


def orpo_loss(chosen: Tensor, rejected: Tensor, *, odds_coefficient: float) -> Tensor:
    """Odds-ratio preference optimisation, per pair, to be minimised: likelihood of w, plus the odds of w over l.

        L = -a_w - lambda log sigmoid(o_w - o_l),   o = a - log(1 - exp(a)),   a = mean log-prob of the tokens

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.

    Args:
        chosen, rejected: [P] float32, nats per token, <= 0. *Mean* log-probs; carry the gradient.
        odds_coefficient: lambda, >= 0.

    Returns:
        [P] as `margin_loss`. The odds are those of at most 1 - 1e-6, so that a certain completion has finite ones.
    """
    finite, (win, lose) = finite_inputs(chosen, rejected)
    odds = _log_odds(win) - _log_odds(lose)
    return nan_where_not(finite, -win - odds_coefficient * functional.logsigmoid(odds))


def _log_odds(log_probs: Tensor) -> Tensor:
    bounded = log_probs.double().clamp(max=-1e-6)
    return (bounded - torch.log(-torch.expm1(bounded))).to(log_probs.dtype)


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    reference_kl: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation, per completion, to be minimised; a completion is good or bad, there are no pairs.

        L = w_d (1 - sigmoid(beta (h - z)))   desirable         h = log pi(y) - log ref(y)
        L = w_u (1 - sigmoid(beta (z - h)))   undesirable       z = KL(pi || ref), a constant

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.

    Args:
        log_probs: [N] float32, nats, of whole completions. Carries the gradient.
        ref_log_probs: [N] float32, nats. Constant in the gradient.
        desirable: [N] bool.
        reference_kl: z, nats, >= 0; of `kto_reference_kl`, over the global batch.
        beta: risk aversion, > 0.
        desirable_weight, undesirable_weight: w_d and w_u; weigh classes of unequal size.

    Returns:
        [N] in log_probs' dtype, in [0, w]; nan with gradient 0 where an input is not finite.
    """
    finite, (log_ratio,) = finite_inputs(log_probs - ref_log_probs.detach())
    gain = beta * (log_ratio - reference_kl)
    losses = torch.where(
        desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )  # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits
    return nan_where_not(finite, losses)


def kto_reference_kl(log_ratio_sum: float, count: float) -> float:
    """z of `kto_loss`: max(0, mean of log pi(y') - log ref(y')), y' a completion of *another* prompt of the batch.

    Both numbers are sums over the global batch. Mismatched pairs give the shift that the policy made everywhere; it is
    a biased estimate, for y' are no samples of pi, and 0 where negative. Over nothing it is 0.

    Source: arXiv:2402.01306, section 4.1.
    """
    return max(0.0, log_ratio_sum / count) if count else 0.0


@torch.no_grad()
def preference_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor, mask: Tensor) -> dict[str, Metric]:
    """How pairs are ranked, by implicit rewards or by a reward model's.

    Args:
        chosen_rewards, rejected_rewards: [P].
        mask: [P], 1 for the pairs that count; others may hold anything.

    Returns:
        preference/accuracy: pairs with the chosen one above, ties counting half.
        preference/margin, preference/chosen_reward, preference/rejected_reward: means.
    """
    difference = chosen_rewards.double() - rejected_rewards.double()
    return {
        "preference/accuracy": masked_mean((difference > 0).double() + 0.5 * (difference == 0).double(), mask),
        "preference/margin": masked_mean(difference, mask),
        "preference/chosen_reward": masked_mean(chosen_rewards, mask),
        "preference/rejected_reward": masked_mean(rejected_rewards, mask),
    }


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """Negative log-likelihood of a preference, per pair, to be minimised.

        L = -log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2

    The logarithm of a sigmoid is taken as one function: log(sigmoid(x)) is -inf below x = -104 in float32.

    Source: Bradley & Terry 1952; margin: Llama 2, arXiv:2307.09288, eq. 2; centering: Eisenstein et al. 2023,
    arXiv:2312.09244, eq. 8 (it fixes the constant that preferences leave open).

    Args:
        chosen, rejected: [P] float32, rewards of the pairs' completions; carry the gradient.
        margin: [P] float32, by how much the preferred one is better, >= 0; None: 0.
        centering: weight of the penalty on the pair's sum, >= 0.

    Returns:
        [P] in chosen's dtype; nan with gradient 0 where an input is not finite.
    """
    wanted = torch.zeros_like(chosen) if margin is None else margin.detach()
    finite, (win, lose, wanted) = finite_inputs(chosen, rejected, wanted)
    losses = -functional.logsigmoid(win - lose - wanted)
    if centering > 0:
        losses = losses + centering * (win + lose).square()
    return nan_where_not(finite, losses)


def process_reward_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of the label of each step, to be minimised.

        L_t = -(y_t log sigmoid(x_t) + (1 - y_t) log(1 - sigmoid(x_t)))

    The mask says which tokens carry a label: the last of each step.

    Source: Lightman et al. 2023, arXiv:2305.20050, section 2.4; soft labels: Math-Shepherd, arXiv:2312.08935, eq. 3.

    Args:
        logits: [T] float32. Carries the gradient, sigmoid(x_t) - y_t.
        labels: [T] float32, in [0, 1]: right or wrong, or the share of continuations that end right.

    Returns:
        [T] in logits' dtype, nats, before mask and division (`aggregation`); nan with gradient 0 where an input is not
        finite.
    """
    finite, (logits, labels) = finite_inputs(logits, labels.detach())
    losses = functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return nan_where_not(finite, losses)


def reward_regression_loss(rewards: Tensor, targets: Tensor, *, huber_delta: float | None = None) -> Tensor:
    """Squared error of a pointwise reward model, to be minimised: L = (r - y)^2 / 2.

    With a delta it is Huber's: beyond it the loss is delta (|r - y| - delta / 2), and no outlier pulls harder than
    delta.

    Source: Huber 1964, doi:10.1214/aoms/1177703732.

    Args:
        rewards: [N] float32. Carries the gradient.
        targets: [N] float32. Constant in the gradient.
        huber_delta: in units of reward, > 0; None: squared error everywhere.

    Returns:
        [N] in rewards' dtype; nan with gradient 0 where an input is not finite.
    """
    finite, (rewards, targets) = finite_inputs(rewards, targets.detach())
    error = rewards - targets
    if huber_delta is None:
        return nan_where_not(finite, error.square() / 2)
    bounded = error.clamp(-huber_delta, huber_delta)
    return nan_where_not(finite, bounded * (error - bounded / 2))


@torch.no_grad()
def process_reward_metrics(logits: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Metric]:
    """process_reward/accuracy: labelled steps (mask 1) on whose side of 1/2 the model is; all [T]."""
    agree = (logits > 0) == (labels > 0.5)
    return {"process_reward/accuracy": masked_mean(agree.double(), mask)}
