"""The reference policy: the weights that the run started from, kept on the host and swapped in when KL needs them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rl.engine.policy import Policy


class ReferenceWeights:
    """A host copy of this rank's shards."""

    def __init__(self, policy: Policy) -> None:
        """Copy the policy's present weights."""
        self.policy = policy
        self._weights = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters().items()}

    def _parameters(self) -> dict[str, Tensor]:
        # By Megatron's own names: the last stage's copy of a tied embedding is swapped too.
        return {f"{i}.{name}": p for i, gpt in enumerate(self.policy.models) for name, p in gpt.named_parameters()}

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Inside the context the policy's model computes with the reference's weights; afterwards with its own."""
        own = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters().items()}
        self._copy(self._weights)
        try:
            yield
        finally:
            self._copy(own)

    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters().items():
            parameter.data.copy_(weights[name])
