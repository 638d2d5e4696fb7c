"""One rank's part in a weight sync: packs and sends its slices, receives and loads those for it, bucket by bucket.

    sender    parameters -> message of a (bucket, receiver) -> transport
    receiver  transport -> message -> loader, slice by slice; slices that the rank holds itself are sent_copy directly

`Exchange` does it by a rank plan. `Transport`, `Pending` and `Loader` are the interfaces that it needs. `verified` says
which parameters get checksums: senders add the checksum of each slice, and the loader compares each parameter that it
has filled with their sum. A damaged message or one of another version is never loaded (`messages.py`).

The next bucket is sent while the last one is loaded, so there are at most two buckets of messages.

With `max_changed` both sides keep a copy of what was sent, in as much memory again, and a message holds only the
elements that have changed since, if these are not more than that fraction. After a failed round nobody knows what the
other side holds: every rank forgets its copies, and the next round sends everything. The same happens if a receiver was
restarted: it refuses changes to values that it never had.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.plan.shard_plan import Slice
from megatron_rl.weights.transport.messages import (
    SentCopy,
    TransferError,
    Verify,
    checksum_of,
    message_bytes,
    open_message,
    pack_changes,
    pack_whole,
    sent_copy,
    slices_in,
    values_of,
)

_SAMPLED_OF = 16
"""`sync.verify: sample` takes checksums of one parameter in so many, others each time."""


OnFilled = Callable[[str, Tensor], None]
"""Called with the name and the values of an engine's parameter when all of it has come."""


class Loader(Protocol):
    """Takes slices into an engine's parameters."""

    def write(self, piece: Slice, values: Tensor, expected: int | None) -> None:
        """Copy `values` to their place; `expected` is their checksum on the sending side, if it was taken."""
        ...

    def end_bucket(self) -> None:
        """Parameters that are complete may be put to use."""
        ...


class Pending(Protocol):
    """The messages of a bucket that are being sent and received."""

    def arrived(self, sender: int) -> Tensor:
        """The message of a sender, [num_bytes] uint8; waits. Raises TransferError after the transport's time limit."""
        ...

    def loaded(self, sender: int) -> None:
        """The message of a sender is used no more; its memory may be written again."""
        ...

    def sent(self) -> None:
        """Wait until this rank's own messages need their buffers no more. Raises TransferError likewise."""
        ...


class Transport(Protocol):
    """Moves messages between ranks."""

    def allocate(self, bucket: int, receiver: int, num_bytes: int) -> Tensor:
        """Memory for a message to a receiver, [num_bytes] uint8."""
        ...

    def post(self, bucket: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> Pending:
        """Begin to send `outgoing` (receiver -> message) and to receive `incoming` (sender -> bytes, at most)."""
        ...


class Exchange:
    """The part of one rank in a plan: sender, receiver or both. Used again for every version."""

    def __init__(self, rank_plan: RankPlan, *, max_changed: float = 0.0) -> None:
        """Args:
        rank_plan: of this rank.
        max_changed: fraction of a message's elements up to which only changed ones are sent, the same on all ranks; 0:
            always all of them, and no copy is kept.
        """
        self._buckets, self._max_changed = rank_plan.buckets, max_changed
        self._copies: dict[tuple[int, int], SentCopy] = {}  # by (bucket, peer)
        self.sent_bytes = 0
        """Bytes of this rank's messages in the last round."""

    def run(
        self,
        parameters: Mapping[str, Tensor],
        loader: Loader | None,
        transport: Transport,
        *,
        version: int,
        verify: Verify = lambda target: False,
    ) -> None:
        """Send and load one version. Every rank of the plan calls it.

        Args:
            parameters: trained shards by table name; {} on a rank that only receives.
            loader: of this rank's engine; None on a rank that only sends.
            transport: to the other ranks.
            version: of the weights, equal on all ranks.
            verify: whether a target's checksum is taken; the same on all ranks.

        Raises:
            TransferError: a message did not come, or is not what it should be.
        """
        self.sent_bytes = 0
        try:
            self._run(parameters, loader, transport, version, verify)
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Send everything in the next round; every rank does so after a round that failed on any."""
        self._copies.clear()

    def _run(
        self,
        parameters: Mapping[str, Tensor],
        loader: Loader | None,
        transport: Transport,
        version: int,
        verify: Verify,
    ) -> None:
        pending = self._post(0, parameters, transport, version, verify) if self._buckets else None
        for index, bucket in enumerate(self._buckets):
            assert pending is not None
            current, pending = pending, None
            if index + 1 < len(self._buckets):
                pending = self._post(index + 1, parameters, transport, version, verify)
            if loader is not None:
                for piece in bucket.own:
                    values = values_of(piece, parameters)
                    loader.write(piece, values, checksum_of(piece, values, verify))
                for sender, pieces in bucket.incoming.items():
                    with _naming(pieces):
                        message = current.arrived(sender)
                    self._load(index, sender, pieces, message, loader, version, verify)
                    current.loaded(sender)
                loader.end_bucket()
            with _naming([piece for pieces in bucket.outgoing.values() for piece in pieces]):
                current.sent()

    def _post(
        self, index: int, parameters: Mapping[str, Tensor], transport: Transport, version: int, verify: Verify
    ) -> Pending:
        bucket = self._buckets[index]
        outgoing: dict[int, Tensor] = {}
        for receiver, pieces in bucket.outgoing.items():

            def allocate(num_bytes: int, receiver: int = receiver) -> Tensor:
                return transport.allocate(index, receiver, num_bytes)

            copy = self._copies.get((index, receiver))
            if copy is not None:
                share = self._max_changed
                message = pack_changes(
                    pieces, parameters, allocate, copy, max_changed=share, version=version, verify=verify
                )
            else:
                message = pack_whole(pieces, parameters, allocate, version=version, verify=verify)
                self._keep(index, receiver, message, pieces, version)
            outgoing[receiver] = message
            self.sent_bytes += len(message)
        incoming = {sender: message_bytes(pieces, verify) for sender, pieces in bucket.incoming.items()}
        return transport.post(index, outgoing, incoming)

    def _load(
        self,
        index: int,
        sender: int,
        pieces: list[Slice],
        message: Tensor,
        loader: Loader,
        version: int,
        verify: Verify,
    ) -> None:
        copy = self._copies.get((index, sender))
        where = f"from rank {sender}, bucket {index}"
        opened = open_message(message, pieces, where, version=version, verify=verify, copy=copy)
        if copy is None or opened.slices is not copy.slices:
            self._keep(index, sender, message, pieces, version)
        for piece, values, expected in slices_in(opened, pieces, verify):
            loader.write(piece, values, expected)

    def _keep(self, index: int, peer: int, message: Tensor, pieces: list[Slice], version: int) -> None:
        if self._max_changed:
            self._copies[index, peer] = sent_copy(message, pieces, version)


@contextmanager
def _naming(pieces: Sequence[Slice]) -> Iterator[None]:
    """A transport's error says which parameters did not come."""
    try:
        yield
    except TransferError as error:
        raise TransferError(f"{error} (parameters from {pieces[0].target} on)") from None


def verified(verify: str, version: int) -> Verify:
    """Which of the engine's parameters `sync.verify` takes checksums of; the same on every rank.

    Args:
        verify: 'off', 'sample' or 'full'.
        version: decides which ones are sampled.
    """
    if verify == "sample":
        return lambda target: zlib.crc32(target.encode()) % _SAMPLED_OF == version % _SAMPLED_OF
    return lambda target: verify == "full"
