"""The policy as a Hugging Face checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.engine.policy import Policy
from megatron_rl.weights.hf_files import write_hf_checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checkpoint_dtype(hf: dict[str, Any]) -> torch.dtype:
    """Dtype that a config.json says its tensors have (transformers' default is float32).

    Raises:
        UserError: another one than those of `_DTYPES`.
    """
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32")
    if name not in _DTYPES:
        raise UserError(f"dtype '{name}' in config.json is not supported; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def export_hf(policy: Policy, folder: Path, *, bucket_bytes: int = 1 << 30) -> None:
    """Write the policy's weights in the source checkpoint's dtype, with its config, tokenizer and other files.

    Collective over all ranks; rank 0 writes. `folder` appears when it is complete.
    """
    dtype = checkpoint_dtype(policy.hf)
    tensors: Iterator[tuple[str, Tensor]] = policy.hf_tensors(bucket_bytes=bucket_bytes)
    if dist.get_rank() == 0:
        write_hf_checkpoint(
            folder,
            ((name, tensor.to(dtype)) for name, tensor in tensors),
            source=policy.hf_path,
            config=policy.export_config(),
        )
    else:
        for _ in tensors:
            pass
    dist.barrier()
