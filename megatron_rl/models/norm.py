"""Normalisation for the portable layers: LayerNorm and RMSNorm in torch, also under sequence parallelism.

Core's own torch norm refuses sequence parallelism because its weight does not say that its gradient is a partial sum
over the tensor-parallel ranks. This one says so (`sequence_parallel` on the parameter), and core adds it up.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rl.device import this_device


class PortableNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, computed in float32 and returned in the input's dtype.

    Args:
        config: `normalization` chooses the kind; `sequence_parallel`, `params_dtype` are those of the model.
        hidden_size: channels.
        eps: added to the (mean) square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        device = torch.device("cpu") if config.use_cpu_initialization else this_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        if self.bias is None:
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
