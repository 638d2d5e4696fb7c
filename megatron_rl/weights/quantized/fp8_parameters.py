"""Parameters that are kept in FP8 (`model.fp8_param`): what they are worth, and how to fill them.

Transformer Engine keeps such a parameter as codes and scales in a tensor of its own class; a view of it is a copy in
higher precision, so that writing to a view changes nothing. Read, it gives the values that the forward pass computes
with, which are also what is exported and sent to engines. Written, it is rounded once, from float32, and the
optimizer's float32 copy begins with what was written, not with what the rounding left of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


def held_value(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter without gradient; one in FP8 as the values of its codes, in `dtype`."""
    parameter = parameter.detach()
    if not is_float8tensor(parameter):
        return parameter
    value: Tensor = dequantize_fp8_tensor(parameter)
    return value.to(dtype)


@contextmanager
def fillable(parameter: Tensor) -> Iterator[Tensor]:
    """What to fill in the place of a parameter: itself, or, for one in FP8, float32 that is rounded at the end."""
    if not is_float8tensor(parameter):
        yield parameter
        return
    filled = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    yield filled
    with torch.no_grad():
        parameter.copy_(filled)
    # From here core takes the optimizer's float32 copy. Left alone, it holds the random initial weights.
    initial: Any = parameter
    if hasattr(initial, "get_high_precision_init_val"):
        initial._high_precision_init_val = filled.cpu()
