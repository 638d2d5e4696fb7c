"""Where a run computes: the GPU of this rank, or the CPU.

Importing this room prepares Megatron-Core for the device, so every room that imports `megatron` imports this one
first. With CUDA nothing is changed. Without it, `cpu.py` makes core run on CPU tensors and gloo.
"""

import logging
import os
import warnings

import torch

from megatron_rl.device.cpu import prepare_megatron_for_cpu

HAS_CUDA = torch.cuda.is_available()

# Core warns at import of every GPU library that is absent; `megatron-rl doctor` is the place that reports them.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
# It calls collectives by names that the newest torch calls deprecated, at every first use.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")

_LEFT_UNSAID = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""What core logs of its own future at every start, by logger and beginning: nothing that a user can act on."""

for _logger, _beginning in _LEFT_UNSAID.items():
    logging.getLogger(_logger).addFilter(lambda record, text=_beginning: not record.getMessage().startswith(text))  # type: ignore[misc]

if not HAS_CUDA:
    prepare_megatron_for_cpu()


def this_device() -> torch.device:
    """The device of this rank: `cuda:LOCAL_RANK`, or the CPU where there is no CUDA."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if HAS_CUDA else torch.device("cpu")


def distributed_backend() -> str:
    """Backend of the training ranks' process groups: nccl, with gloo for host tensors; gloo alone on a CPU."""
    return "cpu:gloo,cuda:nccl" if HAS_CUDA else "gloo"
