"""Which elements of a slice have changed since it was last sent, and how to bring a copy up to date with them.

A step of reinforcement learning at a small learning rate moves most bfloat16 weights by less than half their last bit:
few elements change, and only these need to travel. Elements are compared by their bits, so the copy is exact, also for
zeros of either sign and nan. Pure: tensors in, tensors out.
"""

from torch import Tensor

from megatron_rl.weights.checksum import bits


def take_changes(held: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The changed elements of a slice, and the copy brought up to date.

    Args:
        held: [num_bytes] uint8, what the slice was; overwritten by what it is.
        values: the slice, of any shape and dtype of as many bytes.

    Returns:
        Their positions in the flat slice, [n] int32, and their bits, [n] integers as wide as an element.
    """
    new = bits(values).reshape(-1)
    assert new.numel() < 2**31, "positions are 32-bit"
    old = held.view(new.dtype)
    changed = (old != new).nonzero().squeeze(1)
    old.copy_(new)
    return changed.int(), new[changed]


def apply_changes(held: Tensor, positions: Tensor, values: Tensor) -> None:
    """Bring a copy of a slice up to date, in place; arguments as returned by `take_changes`."""
    held.view(values.dtype)[positions.long()] = values
