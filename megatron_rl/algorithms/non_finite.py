"""What every loss here does with an input that is nan or infinite: its value is nan and its gradient 0.

A token under the mask may hold anything (garbage of an engine, the positions of a prompt); its gradient must be 0, and
0 * nan is not. A token that counts must not be passed over in silence; its nan reaches the loss, and the step is
stopped or skipped. So a loss is computed with 0 in place of bad inputs, and nan is put where it was computed so.
"""

import torch
from torch import Tensor


def finite_inputs(*inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Where all inputs are finite, and the inputs with 0 (and no gradient) elsewhere.

    Args:
        inputs: of one shape, or such that they broadcast to one.

    Returns:
        bool of that shape, and the inputs.
    """
    finite = torch.isfinite(inputs[0])
    for value in inputs[1:]:
        finite = finite & torch.isfinite(value)
    return finite, [torch.where(finite, value, 0.0) for value in inputs]


def nan_where_not(finite: Tensor, values: Tensor) -> Tensor:
    """The values, nan (and no gradient) where not finite."""
    return torch.where(finite, values, torch.nan)
