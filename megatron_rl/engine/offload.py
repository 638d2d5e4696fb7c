"""Memory that training does not need while colocated engines generate: gradients and the optimizer's state.

Gradient buffers hold nothing between steps, so they are given up and come back as zeros. The optimizer's state goes to
the host and back; on a CPU it is there already. Parameters stay: they are what engines are sent, and what log-probs are
computed with.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megatron_rl.device import HAS_CUDA
from megatron_rl.engine.optimizer import Optimizer


class TrainingMemory:
    """What one model takes for its training, beside its parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._chunks: list[Any] = list(optimizer.policy.chunks)
        self._optimizer: Any = optimizer.megatron
        self._is_free = False

    def free(self) -> None:
        """Give the memory up, until `take_back`. Between steps, when gradients are of no use any more."""
        if self._is_free:
            return
        for chunk in self._chunks:
            chunk.offload_grad_buffers(synchronize=HAS_CUDA, empty_cache=False)
        for state, _ in self._states():
            for name, tensor in _large(state):
                state[name] = tensor.cpu()
        self._is_free = True

    def take_back(self) -> None:
        """Take it again, before a step: gradients are zero, the optimizer's state what it was."""
        if not self._is_free:
            return
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=HAS_CUDA)
        for state, parameter in self._states():
            for name, tensor in _large(state):
                state[name] = tensor.to(parameter.device)
        self._is_free = False

    def _states(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            torch_optimizer = getattr(part, "optimizer", None)
            if torch_optimizer is not None:
                yield from ((state, parameter) for parameter, state in torch_optimizer.state.items())


def _large(state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Moments, and not the scalars that Adam keeps where it likes."""
    return [(name, value) for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0]
