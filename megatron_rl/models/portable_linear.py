"""Linear layers for the portable specs where core's own do not do: held whole, and of experts with a bias."""

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_rl.device import this_device


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole: latent attention's projections to the latents.

    Built by core's latent attention with its arguments; those not named are not needed here. The output of the
    projection for keys and values ends in the channels that all heads share as their rotary key. Without sequence
    parallelism each rank goes on with the heads that it holds, so the gradient of those channels is a partial sum,
    which core does not add up; it is added up here.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Any,
        tp_comm_buffer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else this_device()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        shared_key = tp_comm_buffer_name == "kv_down_proj" and not config.sequence_parallel
        self.partial_channels: int = config.qk_pos_emb_head_dim if shared_key else 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input_size] -> [..., output_size]."""
        out = nn.functional.linear(x, self.weight)
        if self.partial_channels:
            latent, key = out.split([out.shape[-1] - self.partial_channels, self.partial_channels], dim=-1)
            out = torch.cat([latent, copy_to_tensor_model_parallel_region(key)], dim=-1)
        return out, None


class ExpertRowParallelLinear(RowParallelLinear):
    """Core's, with an output that may be changed in place: core adds an expert's bias to it so, which autograd refuses
    for the view that its own returns where experts are not split."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, input_size / ranks] -> [T, output_size], and the bias that is yet to be added."""
        out, bias = super().forward(x)
        return out if bias is None else out.clone(), bias
