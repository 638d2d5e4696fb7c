"""Distillation on the student's own samples.

The objective is E over the student's completions of KL(student || teacher), token by token. With the teacher's
log-probs of the sampled tokens alone it is a policy gradient whose reward is log teacher - log student
(`distillation_advantages` with `reinforce_loss`); with whole distributions it is exact per position
(`distillation_loss`; for a vocabulary that is sharded over ranks, or known by its top k, see `parallel`).
"""

import math

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import exact_kl


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
