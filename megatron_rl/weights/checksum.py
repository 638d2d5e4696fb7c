"""A checksum of a parameter that its shards' slices add up to, whoever sent them and in whatever order.

    checksum(X) = sum_i a(i) sum_j X[i, j] + sum_j b(j) sum_i X[i, j]   (mod 2^64),   a, b: hashes of row and column

over the elements' bits as integers. It is a sum over elements, so slices are summed up where they are sent and the
whole where it arrived. A changed bit changes it; so do rows or columns that changed places.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd multipliers near 2^64 / phi and 2^64 / sqrt(3), as signed numbers.
_ROW, _COLUMN = -7046029254386353131, -8116567392432202711
_CHUNK = 1 << 22
"""Elements looked at at a time."""


def checksum(values: Tensor, start: Sequence[int] = (), row_step: int = 1) -> int:
    """Checksum of a box of a parameter, a signed 64-bit integer.

    Args:
        values: [n] or [n, m], any dtype of 1, 2, 4 or 8 bytes.
        start: where the box begins in its parameter; () is its origin.
        row_step: its rows are so far apart there.
    """
    first_row, first_column = (*start, 0, 0)[:2]
    elements = bits(values)
    elements = elements.reshape(len(elements), -1)
    rows, columns = elements.shape
    columns_hash = torch.arange(first_column, first_column + columns, device=elements.device) * _COLUMN
    rows_hash = (first_row + torch.arange(rows, device=elements.device) * row_step) * _ROW + 1
    total = torch.zeros((), dtype=torch.int64, device=elements.device)
    for begin in range(0, rows, step := max(1, _CHUNK // max(1, columns))):
        part = elements[begin : begin + step]
        total += (part.sum(1, dtype=torch.int64) * rows_hash[begin : begin + step]).sum()
        total += (part.sum(0, dtype=torch.int64) * columns_hash).sum()
    return int(total)


def bits(values: Tensor) -> Tensor:
    """The elements as integers of as many bytes, in the same shape; a view where `values` is contiguous."""
    return values.detach().contiguous().view(_INTEGERS[values.element_size()])


def add(one: int, other: int) -> int:
    """Sum of two checksums, again a signed 64-bit integer."""
    return (one + other + (1 << 63)) % (1 << 64) - (1 << 63)


def byte_sum(message: Tensor) -> int:
    """Sum of a message's 64-bit words. message: [8 n] uint8."""
    return int(message.view(torch.int64).sum()) if len(message) else 0
