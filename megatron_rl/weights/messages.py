"""What a message between two ranks of a plan looks like: the slices of a bucket, and what proves them.

    body | checksum of each slice, if verified | base | sum of the body's slices | version | sum of the words before

    base -1: the body is the slices, each padded to 8 bytes
    base B:  the body is what has changed since version B, slice by slice:
             number of changed elements of each | their positions, int32 | their bits      (each padded to 8 bytes)

A message that is damaged, of another synchronisation, or based on a version that the receiver does not hold, is an
error before anything of it is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.weights.checksum import byte_sum, checksum
from megatron_rl.weights.delta import apply_changes, take_changes
from megatron_rl.weights.entries import ITEMSIZE
from megatron_rl.weights.shard_plan import Slice

_ALIGNMENT = 8
_TRAILER_WORDS = 4
_WHOLE = -1
"""Base of a message that needs none."""

Verify = Callable[[str], bool]
Allocate = Callable[[int], Tensor]


class TransferError(RuntimeError):
    """Weights did not arrive: a peer is gone, late, or sent something else. Names peer, bucket and parameter."""


@dataclass
class Copy:
    """Slices of a message as they were sent last: [num_bytes] uint8, padded as in a message."""

    slices: Tensor
    version: int


def values_of(piece: Slice, parameters: Mapping[str, Tensor]) -> Tensor:
    """The values of a slice at its sender, in the dtype in which they travel."""
    return parameters[piece.source].detach()[piece.block.source_box].to(getattr(torch, piece.dtype))


def checksum_of(piece: Slice, values: Tensor, verify: Verify) -> int | None:
    """The slice's part of its target's checksum, if that is verified."""
    return checksum(values, piece.block.target_start, piece.block.target_step) if verify(piece.target) else None


def message_bytes(pieces: Sequence[Slice], verify: Verify) -> int:
    """Length of a message that holds the slices whole; no other is longer."""
    return _slices_bytes(pieces) + _proof_bytes(pieces, verify)


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


def copied(message: Tensor, pieces: Sequence[Slice], version: int) -> Copy:
    """The copy that a message of whole slices leaves on either side."""
    return Copy(message[: _slices_bytes(pieces)].clone(), version)


def pack_changes(
    pieces: Sequence[Slice],
    parameters: Mapping[str, Tensor],
    allocate: Allocate,
    copy: Copy,
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
    message = allocate(length + _proof_bytes(pieces, verify))
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
    message: Tensor, pieces: Sequence[Slice], where: str, *, version: int, verify: Verify, copy: Copy | None
) -> Opened:
    """Check a message; of one with changes, bring `copy` up to date, whose slices are then the result's.

    Raises:
        TransferError: it is damaged, of another version, or based on another than `copy`'s. `where` is in the text.
    """
    where = f"weights {where} (parameters from {pieces[0].target} on)"
    proof = _proof_bytes(pieces, verify)
    if len(message) < proof or len(message) % _ALIGNMENT:
        raise TransferError(f"{where}: {len(message)} bytes are no message")
    *checksums, base, slices_sum, sent_version, total = message[-proof:].view(torch.int64).tolist()
    if total != byte_sum(message[:-8]):
        raise TransferError(f"{where}: damaged on the way")
    if sent_version != version:
        raise TransferError(f"{where}: version {sent_version}, expected {version}")
    body = message[:-proof]
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


def _update(copy: Copy, body: Tensor, pieces: Sequence[Slice]) -> None:
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


def _proof_bytes(pieces: Sequence[Slice], verify: Verify) -> int:
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
