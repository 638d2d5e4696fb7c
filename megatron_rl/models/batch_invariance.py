"""Kernels whose results do not depend on the rest of the batch: Megatron's, and Megatron's beside vLLM's.

Both libraries replace operators of torch for the whole process, and torch up to 2.11 refuses a second replacement of an
operator. Megatron's are there first, since the policy is built before the engine is started, and vLLM would end with
"there's already a kernel registered". So a process that hosts an engine keeps of Megatron's what vLLM does not bring:

    operator                 beside vLLM
    mm, addmm                Megatron's; vLLM's on compute capability 8, where alone it has them
    _log_softmax, mean.dim   vLLM's
    Transformer Engine's     Megatron's

Engine and policy then multiply with the same kernels, which neither library on its own would give.
"""

from typing import Any

import torch


def enable() -> None:
    """Take Megatron's kernels."""
    _kernels().enable_batch_invariant_mode()


def make_room_for_vllm(capability: tuple[int, int] | None) -> None:
    """Before vLLM starts with VLLM_BATCH_INVARIANT=1 in this process: leave to it what it brings.

    Args:
        capability: of this rank's GPU; None: there is none.
    """
    kernels = _kernels()
    if not kernels.is_batch_invariant_mode_enabled():
        return
    kernels.disable_batch_invariant_mode()
    library = torch.library.Library("aten", "IMPL")
    key = "CPU" if capability is None else "CUDA"
    if capability is None or capability[0] != 8:
        library.impl("aten::mm", kernels.mm_batch_invariant, key)
        library.impl("aten::addmm", kernels.addmm_batch_invariant, key)
    # Core's own switch finds its state as if it had done all this, and can undo it.
    kernels._batch_invariant_MODE, kernels._batch_invariant_LIB = True, library
    kernels._te_patch_for_batch_invariant()


def _kernels() -> Any:
    from megatron.core.transformer.custom_layers import batch_invariant_kernels  # imports Triton

    return batch_invariant_kernels
