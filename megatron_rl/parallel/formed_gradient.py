"""A loss whose gradient was formed in the forward pass; the backward pass hands it on."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_formed_gradient(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    *,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    in_main_grad: bool,
) -> Tensor:
    """The loss (a scalar without gradient) as a differentiable function of hidden states and weight.

    Args:
        grad_hidden, grad_weight: its gradients; None where there is none to hand on. Overwritten by a scaling.
        in_main_grad: the weight's gradient is in main_grad already, unscaled: the backward pass must begin with 1.

    Raises:
        RuntimeError: in the backward pass, if it is run twice or, with in_main_grad, begins with another number.
    """
    result: Tensor = _FormedGradient.apply(hidden, weight, loss, (grad_hidden, grad_weight), in_main_grad)
    return result


class _FormedGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        gradients: tuple[Tensor | None, Tensor | None],
        in_main_grad: bool,
    ) -> Tensor:
        ctx.gradients, ctx.in_main_grad = gradients, in_main_grad
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients formed in the forward pass are used up: run the backward pass only once")
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.in_main_grad:
            _check_is_one(grad_loss)
        else:
            gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return *gradients, None, None, None


def _check_is_one(grad_loss: Tensor) -> None:
    """The gradient is in main_grad already, unscaled."""
    if grad_loss.is_cuda:
        torch._assert_async(grad_loss == 1)  # without waiting for the device
    elif float(grad_loss) != 1.0:
        raise RuntimeError(f"the loss's gradient is {float(grad_loss)}; with main_grad it must be 1")
