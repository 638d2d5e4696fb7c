"""Parameters that are kept in FP8 (`model.fp8_param`): reading their values, and filling them.

Transformer Engine keeps such a parameter as codes and scales in a tensor class of its own; a view of it is a copy in
higher precision, so writing to a view changes nothing. `dequantized` gives the values that the forward pass computes
with; they are exported and sent to engines. `fillable` rounds new values once, from float32, and the optimizer's
float32 copy starts from the values before rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


def dequantized(parameter: Tensor, dtype: torch.dtype) -> Tensor:
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
