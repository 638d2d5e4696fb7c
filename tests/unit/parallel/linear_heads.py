"""What the tests of the fused heads share: an example, its float64 reference, and both heads under one call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.parallel.fused_linear_log_probs import fused_linear_log_probs
from megatron_rl.parallel.fused_linear_token_loss import fused_linear_token_loss


@dataclass(eq=False)
class Example:
    """T tokens, H features, a padded vocabulary of V."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    vocab_size: int

    @staticmethod
    def draw(
        num_tokens: int = 11,
        features: int = 16,
        width: int = 48,
        vocab_size: int = 41,
        *,
        dtype: torch.dtype = torch.float32,
        scale: float = 2.0,
    ) -> "Example":
        """Logits have a standard deviation of `scale`."""
        generator = torch.Generator().manual_seed(vocab_size)
        hidden = torch.randn(num_tokens, features, generator=generator)
        weight = scale * features**-0.5 * torch.randn(width, features, generator=generator)
        labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
        labels[:2] = torch.tensor([0, vocab_size - 1])[:num_tokens]
        return Example(hidden.to(dtype), weight.to(dtype), labels, vocab_size)

    def extreme(self, magnitude: float) -> "Example":
        """With logits of that size: integers, which float32 holds exactly, and a weight that picks them. In some rows
        they lie twice the magnitude apart."""
        hidden = (2 * self.hidden).round() + magnitude
        hidden[::4, ::3] = -magnitude
        features = hidden.shape[1]
        return Example(
            hidden, torch.eye(features)[torch.arange(len(self.weight)) % features], self.labels, self.vocab_size
        )

    def masked(self) -> "Example":
        """Without labels where `token_losses` has weight 0."""
        places = torch.arange(len(self.labels))
        return Example(self.hidden, self.weight, torch.where(places % 5 == 3, -100, self.labels), self.vocab_size)


def token_losses(log_probs: Tensor, entropy: Tensor, tokens: Any) -> Tensor:
    """A loss that is not linear in either, with weights of both signs that depend on the token's place, some 0."""
    place = torch.arange(1000)[tokens][: len(log_probs)].to(log_probs.device)
    weights = torch.where(place % 5 == 3, 0.0, (place % 4 - 1.2) / 10).to(log_probs.dtype)
    log_probs, entropy = (torch.where(weights != 0, x, 0.0) for x in (log_probs, entropy))
    return weights * (log_probs + 0.1 * log_probs**2 - 0.3 * entropy)


def reference(example: Example, temperature: float = 1.0, losses: Any = token_losses) -> dict[str, Tensor]:
    """Everything in float64 from log_softmax of the whole matrix of logits."""
    hidden = example.hidden.detach().double().requires_grad_()
    weight = example.weight.detach().double().requires_grad_()
    logits = hidden @ weight[: example.vocab_size].t()
    logits.retain_grad()
    log_softmax = (logits / temperature).log_softmax(1)
    log_probs = log_softmax.gather(1, example.labels.clamp(min=0)[:, None])[:, 0]
    log_probs = torch.where(example.labels >= 0, log_probs, torch.nan)
    entropy = -(log_softmax.exp() * log_softmax).sum(1)
    loss = losses(log_probs, entropy, slice(None)).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert logits.grad is not None
    return dict(
        loss=loss.detach(),
        log_probs=log_probs.detach(),
        entropy=entropy.detach(),
        hidden=hidden.grad,
        weight=weight.grad,
        logits=logits.grad,
    )


def two_pass(hidden: Tensor, weight: Tensor, labels: Tensor, losses: Any, **arguments: Any) -> tuple[Tensor, ...]:
    """(loss, log_probs, entropy) with the gradient made in the backward pass."""
    log_probs, entropy = fused_linear_log_probs(hidden, weight, labels, **arguments)
    assert entropy is not None
    return losses(log_probs, entropy, slice(None)).sum(), log_probs, entropy


Head = Callable[..., tuple[Tensor, ...]]
HEADS: dict[str, Head] = {"two_pass": two_pass, "single_pass": fused_linear_token_loss}


def run(head: Head, example: Example, *, losses: Any = token_losses, **arguments: Any) -> dict[str, Tensor]:
    """The head on an example, forward and backward."""
    hidden, weight = example.hidden.clone().requires_grad_(), example.weight.clone().requires_grad_()
    arguments = {"group": None, "vocab_size": example.vocab_size, **arguments}
    loss, log_probs, entropy = head(hidden, weight, example.labels, losses, **arguments)
    loss.backward()
    assert hidden.grad is not None
    found = dict(loss=loss, log_probs=log_probs, entropy=entropy, hidden=hidden.grad)
    if weight.grad is not None:
        found["weight"] = weight.grad
    return {name: value.detach() for name, value in found.items()}


class Watch(TorchDispatchMode):
    """The elements of the largest tensor that an operation allocated, and the names of the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.collectives: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "c10d":
            self.collectives.append(function.name().removeprefix("c10d::").rstrip("_"))
        before = {t.untyped_storage().data_ptr() for t in [*args, *kwargs.values()] if isinstance(t, Tensor)}
        result = function(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
