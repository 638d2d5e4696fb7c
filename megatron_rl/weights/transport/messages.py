"""The messages between two ranks of a shard plan: their format, their checksums, and messages of changes alone.

    body | checksum of each slice, if verified | base | sum of the body's slices | version | sum of the words before

    base -1: the body is the slices, each padded to 8 bytes
    base B:  the body is what has changed since version B, slice by slice:
             number of changed elements of each | their positions, int32 | their bits      (each padded to 8 bytes)

`pack_whole` and `pack_changes` make a message, `open_message` checks one, `slices_in` reads it. A message that is
damaged, of another synchronisation, or based on a version that the receiver does not hold, is an error before anything
of it is loaded.

`checksum` is a sum over the elements' bits as integers, so the checksums of a parameter's slices add up to its own:

    checksum(X) = sum_i a(i) sum_j X[i, j] + sum_j b(j) sum_i X[i, j]   (mod 2^64),   a, b: hashes of row and column

A changed bit changes it, and so do rows or columns that changed places.

`take_changes` finds the elements that have changed since a slice was last sent; `apply_changes` updates a copy. At a
small learning rate a step moves most bfloat16 weights by less than half their last bit, so few elements change.
Elements are compared by their bits: the copy is exact, also for zeros of either sign and nan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.weights.plan.ranks import ITEMSIZE
from megatron_rl.weights.plan.shard_plan import Slice

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd multipliers near 2^64 / phi and 2^64 / sqrt(3), as signed numbers.
_ROW, _COLUMN = -7046029254386353131, -8116567392432202711
_CHUNK = 1 << 22
"""Elements looked at at a time."""


def checksum(values: Tensor, start: Sequence[int] = (), row_step: int = 1) -> int:
    """Checksum of a block of a parameter, a signed 64-bit integer.

    Args:
        values: [n] or [n, m], any dtype of 1, 2, 4 or 8 bytes.
        start: where the block begins in its parameter; () is its origin.
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


def take_changes(previous: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The changed elements of a slice, and the copy brought up to date.

    Args:
        previous: [num_bytes] uint8, what the slice was; overwritten by what it is.
        values: the slice, of any shape and dtype of as many bytes.

    Returns:
        Their positions in the flat slice, [n] int32, and their bits, [n] integers as wide as an element.
    """
    new = bits(values).reshape(-1)
    assert new.numel() < 2**31, "positions are 32-bit"
    old = previous.view(new.dtype)
    changed = (old != new).nonzero().squeeze(1)
    old.copy_(new)
    return changed.int(), new[changed]


def apply_changes(previous: Tensor, positions: Tensor, values: Tensor) -> None:
    """Bring a copy of a slice up to date, in place; arguments as returned by `take_changes`."""
    previous.view(values.dtype)[positions.long()] = values


_ALIGNMENT = 8
_TRAILER_WORDS = 4
_WHOLE = -1
"""Base of a message that needs none."""

Verify = Callable[[str], bool]
Allocate = Callable[[int], Tensor]


class TransferError(RuntimeError):
    """Weights did not arrive: a peer is gone, late, or sent something else. Names peer, bucket and parameter."""


@dataclass
class SentCopy:
    """Slices of a message as they were last sent: [num_bytes] uint8, padded as in a message; kept by both sides."""

    slices: Tensor
    version: int


def values_of(piece: Slice, parameters: Mapping[str, Tensor]) -> Tensor:
    """The values of a slice at its sender, in the dtype in which they travel."""
    return parameters[piece.source].detach()[piece.block.source_index].to(getattr(torch, piece.dtype))


def checksum_of(piece: Slice, values: Tensor, verify: Verify) -> int | None:
    """The slice's part of its target's checksum, if that is verified."""
    return checksum(values, piece.block.target_start, piece.block.target_step) if verify(piece.target) else None


def message_bytes(pieces: Sequence[Slice], verify: Verify) -> int:
    """Length of a message that holds the slices whole; no other is longer."""
    return _slices_bytes(pieces) + _trailer_bytes(pieces, verify)


def pack_whole(
    pieces: Sequence[Slice], parameters: Mapping[str, Tensor], allocate: Allocate, *, version: int, verify: Verify
) -> Tensor:
    """A message of all values.

    Args:
        pieces: in the order of the message.
        parameters: trained shards by table name.
        allocate: gives memory for so many bytes, uint8.
        version: of the weights.
        verify: whether a target's checksum is taken.
    """
    message = allocate(message_bytes(pieces, verify))
    checksums: list[int] = []
    offset = 0
    for piece in pieces:
        values = values_of(piece, parameters)
        end = offset + piece.num_bytes
        message[offset:end].view(values.dtype).view(piece.block.size).copy_(values)
        if (part := checksum_of(piece, values, verify)) is not None:
            checksums.append(part)
        offset += _padded(piece.num_bytes)
        message[end:offset] = 0
    _seal(message, offset, checksums, base=_WHOLE, slices_sum=0, version=version)
    return message


def sent_copy(message: Tensor, pieces: Sequence[Slice], version: int) -> SentCopy:
    """The copy that a message of whole slices leaves on either side."""
    return SentCopy(message[: _slices_bytes(pieces)].clone(), version)


def pack_changes(
    pieces: Sequence[Slice],
    parameters: Mapping[str, Tensor],
    allocate: Allocate,
    copy: SentCopy,
    *,
    max_changed: float,
    version: int,
    verify: Verify,
) -> Tensor:
    """A message of what has changed, or of everything if more than a share of `max_changed` has. `copy` is updated."""
    checksums: list[int] = []
    positions: list[Tensor] = []
    changed: list[Tensor] = []
    offset = 0
    for piece in pieces:
        values = values_of(piece, parameters)
        held = copy.slices[offset : offset + piece.num_bytes]
        where, what = take_changes(held, values.to(held.device))
        positions.append(where)
        changed.append(what.view(torch.uint8))
        if (part := checksum_of(piece, values, verify)) is not None:
            checksums.append(part)
        offset += _padded(piece.num_bytes)
    base, copy.version = copy.version, version
    counts = torch.tensor([len(where) for where in positions], device=copy.slices.device)
    body = [counts.view(torch.uint8), *_aligned(torch.cat(positions).view(torch.uint8)), *_aligned(torch.cat(changed))]
    length = sum(len(part) for part in body)
    if int(counts.sum()) > max_changed * sum(piece.block.numel for piece in pieces) or length > offset:
        body, base, length = [copy.slices], _WHOLE, offset
    message = allocate(length + _trailer_bytes(pieces, verify))
    torch.cat(body, out=message[:length])
    slices_sum = 0 if base == _WHOLE else byte_sum(copy.slices)
    _seal(message, length, checksums, base=base, slices_sum=slices_sum, version=version)
    return message


def _seal(message: Tensor, offset: int, checksums: list[int], *, base: int, slices_sum: int, version: int) -> None:
    words = message.view(torch.int64)
    words[offset // 8 : -1] = torch.tensor([*checksums, base, slices_sum, version], device=message.device)
    words[-1] = byte_sum(message[:-8])


@dataclass(frozen=True)
class Opened:
    """A message that has been checked.

    Attributes:
        slices: [num_bytes] uint8, each slice padded.
        checksums: of the verified ones, in order.
    """

    slices: Tensor
    checksums: list[int]


def open_message(
    message: Tensor, pieces: Sequence[Slice], where: str, *, version: int, verify: Verify, copy: SentCopy | None
) -> Opened:
    """Check a message; of one with changes, bring `copy` up to date, whose slices are then the result's.

    Raises:
        TransferError: it is damaged, of another version, or based on another than `copy`'s. `where` is in the text.
    """
    where = f"weights {where} (parameters from {pieces[0].target} on)"
    trailer = _trailer_bytes(pieces, verify)
    if len(message) < trailer or len(message) % _ALIGNMENT:
        raise TransferError(f"{where}: {len(message)} bytes are no message")
    *checksums, base, slices_sum, sent_version, total = message[-trailer:].view(torch.int64).tolist()
    if total != byte_sum(message[:-8]):
        raise TransferError(f"{where}: damaged on the way")
    if sent_version != version:
        raise TransferError(f"{where}: version {sent_version}, expected {version}")
    body = message[:-trailer]
    if base == _WHOLE:
        if len(body) != _slices_bytes(pieces):
            raise TransferError(f"{where}: {len(body)} bytes of slices, expected {_slices_bytes(pieces)}")
        return Opened(body, checksums)
    if copy is None or copy.version != base:
        held = "nothing" if copy is None else f"version {copy.version}"
        raise TransferError(f"{where}: changes since version {base}, and the engine's rank holds {held}")
    _update(copy, body, pieces)
    copy.version = version
    if byte_sum(copy.slices) != slices_sum:
        raise TransferError(f"{where}: changes since version {base} do not make version {version}")
    return Opened(copy.slices, checksums)


def _update(copy: SentCopy, body: Tensor, pieces: Sequence[Slice]) -> None:
    counts = body[: 8 * len(pieces)].view(torch.int64).tolist()
    first = 8 * len(pieces)
    positions = body[first : first + 4 * sum(counts)].view(torch.int32)
    value, offset, done = first + _padded(4 * sum(counts)), 0, 0
    for piece, count in zip(pieces, counts, strict=True):
        itemsize = ITEMSIZE[piece.dtype]
        # Elements of other sizes may come before, so that these need not lie on a boundary of their own size.
        values = body[value : value + count * itemsize].clone().view(_BITS[itemsize])
        apply_changes(copy.slices[offset : offset + piece.num_bytes], positions[done : done + count], values)
        value, offset, done = value + count * itemsize, offset + _padded(piece.num_bytes), done + count


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def _aligned(part: Tensor) -> list[Tensor]:
    return [part, part.new_zeros(_padded(len(part)) - len(part))]


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _slices_bytes(pieces: Sequence[Slice]) -> int:
    return sum(_padded(piece.num_bytes) for piece in pieces)


def _trailer_bytes(pieces: Sequence[Slice], verify: Verify) -> int:
    return 8 * (sum(verify(piece.target) for piece in pieces) + _TRAILER_WORDS)


def slices_in(opened: Opened, pieces: Sequence[Slice], verify: Verify) -> list[tuple[Slice, Tensor, int | None]]:
    """Each slice of a message with its values, and the checksum of the sender if it was taken."""
    out: list[tuple[Slice, Tensor, int | None]] = []
    offset, checksums = 0, iter(opened.checksums)
    for piece in pieces:
        bytes_of = opened.slices[offset : offset + piece.num_bytes]
        values = bytes_of.view(getattr(torch, piece.dtype)).view(piece.block.size)
        out.append((piece, values, next(checksums) if verify(piece.target) else None))
        offset += _padded(piece.num_bytes)
    return out
