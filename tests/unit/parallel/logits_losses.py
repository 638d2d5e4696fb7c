"""Losses of whole distributions: as one writes them for `fused_linear_logits_loss`, and in float64."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.supervised_loss import distillation_loss, label_smoothed_loss
from megatron_rl.parallel.fused_linear_logits_loss import LinearLogits, fused_linear_logits_loss
from megatron_rl.parallel.vocab_parallel_divergences import with_tail
from tests.unit.parallel.linear_heads import Example

TOP_K = 3
DIRECTIONS = ("forward", "reverse", "jensen_shannon")


def teacher_of(example: Example) -> tuple[Tensor, Tensor]:
    """Hidden states [T, 8] and weight [V, 8] of another model."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(len(example.hidden), 8, generator=generator)
    weight = 8**-0.5 * torch.randn(len(example.weight), 8, generator=generator)
    return hidden, weight


def weights_of(num_tokens: int) -> Tensor:
    """Of the tokens: both signs, and some masked."""
    place = torch.arange(num_tokens)
    return torch.where(place % 5 == 3, 0.0, (place % 4 - 1.2) / 10)


@functools.cache
def top_of(example: Example) -> tuple[Tensor, Tensor]:
    """The teacher's most probable tokens [T, K] and their log-probs, in float64."""
    hidden, weight = teacher_of(example)
    log_softmax = (hidden.double() @ weight[: example.vocab_size].double().t()).log_softmax(1)
    log_probs, ids = log_softmax.topk(TOP_K)
    return ids, log_probs


# Fused: (logits, example, teacher's logits) -> losses [n], and another value [n].


def _label_smoothing(logits: Any, example: Example, teacher: LinearLogits) -> tuple[Tensor, Tensor]:
    log_probs, mean = logits.log_probs_of(logits.labels[:, None])
    return label_smoothed_loss(log_probs[:, 0], mean, smoothing=0.1), mean


def _divergence(direction: Any) -> Any:
    def losses(logits: Any, example: Example, teacher: LinearLogits) -> tuple[Tensor, Tensor]:
        divergence = logits.divergence(teacher(logits.slots), direction, mixture=0.3)
        return divergence, divergence

    return losses


def _top_k_distillation(logits: Any, example: Example, teacher: LinearLogits) -> tuple[Tensor, Tensor]:
    ids, log_probs = (part[logits.slots] for part in top_of(example))
    student = with_tail(logits.log_probs_of(ids)[0])
    loss = distillation_loss(student, with_tail(log_probs).to(student.dtype), direction="forward", mixture=0.5)
    return loss, logits.argmax()


def _filtered(logits: Any, example: Example, teacher: LinearLogits) -> tuple[Tensor, Tensor]:
    log_probs = logits.filtered_log_probs(top_k=9, top_p=0.8)
    return log_probs, log_probs


LOGITS_LOSSES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "label_smoothing": _label_smoothing,
    **{direction: _divergence(direction) for direction in DIRECTIONS},
    "top_k_distillation": _top_k_distillation,
    "filtered": _filtered,
}


# The same in float64: (log_softmax [T, V], example, temperature) -> losses [T], and the other value [T].


def _exact(name: str, log_softmax: Tensor, example: Example, temperature: float) -> tuple[Tensor, Tensor]:
    target = log_softmax.gather(1, example.labels[:, None])[:, 0]
    if name == "label_smoothing":
        mean = log_softmax.mean(1)
        return -0.9 * target - 0.1 * mean, mean
    if name in DIRECTIONS:
        hidden, weight = (part.double() for part in teacher_of(example))
        q = (hidden @ weight[: example.vocab_size].t() / temperature).log_softmax(1)
        divergence = distillation_loss(log_softmax, q, direction=name, mixture=0.3)
        return divergence, divergence
    if name == "top_k_distillation":
        ids, log_q = top_of(example)
        log_p = log_softmax.gather(1, ids)
        rest_p, rest_q = (1 - part.exp().sum(1) for part in (log_p, log_q))
        loss = (log_q.exp() * (log_q - log_p)).sum(1) + rest_q * (rest_q / rest_p).log()
        return loss, log_softmax.argmax(1)
    # top-k 9, of these the fewest that have 0.8 together, and the label.
    ordered, ids = log_softmax.detach().exp().topk(9)
    before = ordered.cumsum(1) - ordered
    kept = torch.zeros_like(log_softmax, dtype=torch.bool)
    kept.scatter_(1, ids, before < 0.8 * ordered.sum(1, keepdim=True))
    kept.scatter_(1, example.labels[:, None], True)
    log_probs = target - torch.where(kept, log_softmax, -torch.inf).logsumexp(1)
    return log_probs, log_probs


def logits_reference(name: str, example: Example, temperature: float = 1.0) -> dict[str, Tensor]:
    """Loss, the other value and gradients in float64, from log_softmax of the whole matrix of logits."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (example.hidden, example.weight))
    log_softmax = (hidden @ weight[: example.vocab_size].t() / temperature).log_softmax(1)
    losses, value = _exact(name, log_softmax, example, temperature)
    loss = (weights_of(len(hidden)).double() * losses).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return dict(loss=loss.detach(), value=value.detach(), hidden=hidden.grad, weight=weight.grad)


def run_logits_loss(
    name: str,
    example: Example,
    *,
    tokens: slice = slice(None),
    columns: slice = slice(None),
    **arguments: Any,
) -> dict[str, Tensor]:
    """The fused head on an example: this rank's tokens and columns of it, forward and, if there is a gradient, back."""
    hidden, weight = (x.clone().requires_grad_() for x in (example.hidden[tokens], example.weight[columns]))
    arguments = {"group": None, "vocab_size": example.vocab_size, **arguments}
    teacher_hidden, teacher_weight = teacher_of(example)
    sequence_parallel = arguments.get("sequence_parallel", False)
    teacher = LinearLogits(teacher_hidden[tokens], teacher_weight[columns], arguments["group"], sequence_parallel)

    def losses(logits: Any) -> tuple[Tensor, dict[str, Tensor]]:
        found, value = LOGITS_LOSSES[name](logits, example, teacher)
        return found * weights_of(len(example.labels))[logits.slots], {"value": value}

    loss, values = fused_linear_logits_loss(hidden, weight, example.labels, losses, **arguments)
    found = {"loss": loss.detach(), **values}
    if loss.requires_grad:
        loss.backward()
        assert hidden.grad is not None
        found["hidden"] = hidden.grad
    if weight.grad is not None:
        found["weight"] = weight.grad
    return found
