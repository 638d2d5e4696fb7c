"""Losses on given tokens: SFT (plain, smoothed, focal), and distillation from a teacher.

SFT is the negative log-likelihood of the target tokens. The penalty for leaving a reference is `kl.exact_kl` (or its
vocabulary-parallel form): the tokens of a data set are no samples of the policy, so the estimators k1 to k3 do not
estimate KL(policy || reference) on them.

Distillation is on the student's own samples: its objective is E over the student's completions of
KL(student || teacher), token by token. With the teacher's log-probs of the sampled tokens alone it is a policy gradient
whose reward is log teacher - log student (`distillation_advantages` with `reinforce_loss`); with whole distributions it
is exact per position (`distillation_loss`; for a vocabulary that is sharded over ranks, or known by its top k, see
`parallel`).
"""

import math

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import exact_kl
from megatron_rl.algorithms.non_finite import finite_inputs, nan_where_not


def sft_loss(log_probs: Tensor) -> Tensor:
    """Per-token negative log-likelihood, to be minimised: L_t = -log_probs_t.

    Args:
        log_probs: [T] float32, nats. Of the target tokens; carries the gradient.

    Returns:
        [T] in log_probs' dtype, nats. Masked and divided by the caller; see `aggregation`.
    """
    return -log_probs


def label_smoothed_loss(log_probs: Tensor, mean_log_probs: Tensor, *, smoothing: float) -> Tensor:
    """Cross entropy to a target that has `smoothing` spread evenly over the vocabulary, per token, to be minimised.

        L_t = -(1 - eps) log p_t(target) - eps / V sum_v log p_t(v)

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7.

    Args:
        log_probs: [T] float32, nats. Of the target tokens; carries the gradient.
        mean_log_probs: [T] float32, nats. Mean over the vocabulary of each position's log-probs; carries the gradient.
        smoothing: eps, in [0, 1).

    Returns:
        [T] in log_probs' dtype, nats; nan with gradient 0 where an input is not finite.
    """
    finite, (target, mean) = finite_inputs(log_probs, mean_log_probs)
    return nan_where_not(finite, -(1 - smoothing) * target - smoothing * mean)


def focal_loss(log_probs: Tensor, *, gamma: float, alpha: float = 1.0) -> Tensor:
    """Negative log-likelihood that turns from what is known to what is not, per token, to be minimised.

        L_t = -alpha (1 - p_t)^gamma log p_t

    gamma 0 is `sft_loss`. The paper's alpha_t is a weight per class; a vocabulary has no two classes, so here it is one
    number.

    Source: Lin et al. 2017, arXiv:1708.02002, eq. 5.

    Args:
        log_probs: [T] float32, nats, <= 0. Of the target tokens; carries the gradient.
        gamma: focus, >= 0.
        alpha: weight.

    Returns:
        [T] in log_probs' dtype, nats; nan with gradient 0 where an input is not finite.
    """
    finite, (log_probs,) = finite_inputs(log_probs)
    if gamma == 0:
        return nan_where_not(finite, -alpha * log_probs)
    # 1 - p by expm1 keeps its digits near p = 1. At p = 1 itself the derivative of a power below 1 would be infinite.
    missing = (-torch.expm1(log_probs.clamp(max=0))).clamp(min=torch.finfo(log_probs.dtype).tiny)
    return nan_where_not(finite, -alpha * missing.pow(gamma) * log_probs)


def distillation_advantages(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Advantage of each sampled token: -k1 of the student against the teacher.

        A_t = teacher_log_probs_t - log_probs_t

    With `reinforce_loss` the gradient is that of the KL of each position's own distribution; what a token does to later
    positions is left out (that would be the sum of the following A_t: `discounted_returns` with gamma 1).

    Source: Agarwal et al. 2023, arXiv:2306.13649 (on-policy, reverse KL); as a reward per token: Lu et al. 2025,
    thinkingmachines.ai/blog/on-policy-distillation.

    Args:
        log_probs: [T] float32, nats. Of the student that sampled.
        teacher_log_probs: [T] float32, nats. Of the same tokens.

    Returns:
        [T] float32, constant in the gradient.
    """
    return (teacher_log_probs.double() - log_probs.double()).detach().float()


def distillation_loss(
    student_log_probs: Tensor, teacher_log_probs: Tensor, *, direction: str, mixture: float
) -> Tensor:
    """Divergence of whole distributions per position, to be minimised.

        reverse           KL(student || teacher): seeks what the teacher does most
        forward           KL(teacher || student): covers all that the teacher does
        jensen_shannon    b KL(teacher || M) + (1 - b) KL(student || M),   M = b teacher + (1 - b) student

    The last, divided by b, goes to the forward KL as b goes to 0, and divided by 1 - b to the reverse one as b goes to
    1.

    Source: Agarwal et al. 2023, arXiv:2306.13649, section 2 and eq. 1.

    Args:
        student_log_probs: [T, V] nats, normalised. Carries the gradient.
        teacher_log_probs: [T, V] nats, normalised. Constant in the gradient.
        direction: one of the three names above.
        mixture: b, in (0, 1); for 'jensen_shannon' alone.

    Returns:
        [T] in student_log_probs' dtype, nats; not finite where `kl.exact_kl` is not.

    Raises:
        ValueError: unknown direction, or mixture outside its range.
    """
    student, teacher = student_log_probs, teacher_log_probs.detach()
    if direction == "reverse":
        return exact_kl(student, teacher)
    if direction == "forward":
        return exact_kl(teacher, student)
    if direction != "jensen_shannon":
        raise ValueError(f"unknown direction {direction!r}; one of 'reverse', 'forward', 'jensen_shannon'")
    if not 0 < mixture < 1:
        raise ValueError(f"mixture is {mixture}; must be in (0, 1)")
    middle = torch.logaddexp(teacher + math.log(mixture), student + math.log1p(-mixture))
    return mixture * exact_kl(teacher, middle) + (1 - mixture) * exact_kl(student, middle)
