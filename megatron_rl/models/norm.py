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
        config: `normalization` chooses the kind, `layernorm_zero_centered_gamma` whether weights are around 0;
            `sequence_parallel`, `params_dtype` are those of the model.
        hidden_size: channels.
        eps: added to the (mean) square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.rms = config.normalization == "RMSNorm"
        device = torch.device("cpu") if config.use_cpu_initialization else this_device()
        # Weights around 0 stand for 1 + weight.
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        initial = torch.full((hidden_size,), 1.0 - self.offset, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(initial)
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros_like(initial))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        weight = self.weight + self.offset if self.offset else self.weight
        if self.bias is None:
            return torch.nn.functional.rms_norm(x, weight.shape, weight, self.eps)
        return torch.nn.functional.layer_norm(x, weight.shape, weight, self.bias, self.eps)
