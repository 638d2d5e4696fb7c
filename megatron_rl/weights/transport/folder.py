"""Messages of an exchange through files: shared memory where the folder is in /dev/shm, a file system otherwise.

    <folder>/slot<0|1>.<sender>.<receiver>   memory of a message, mapped by both and used again for every second bucket
    <folder>/<round>/<bucket>.<sender>.<receiver>   is there once the slot's message is complete, gone once it is loaded

Fresh memory costs more than what is copied into it, so slots stay. A sender waits until its message is gone before it
makes the next but one: two buckets exist at most. A file `failed` in the round's folder ends every wait with the words
that it holds: a peer has given up, and nobody waits out the time limit.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.weights.transport.exchange import Pending
from megatron_rl.weights.transport.messages import TransferError

_POLL_SECONDS = 0.0002
_FAILED = "failed"


class FolderTransport:
    """Messages between ranks that share a folder."""

    _mapped: dict[str, Tensor]

    def __init__(
        self, folder: Path, rank: int, *, timeout_seconds: float, mapped: dict[str, Tensor] | None = None
    ) -> None:
        """Args:
        folder: of this round of a synchronisation alone; slots are in its parent.
        rank: of this process in the plan.
        timeout_seconds: limit of each wait.
        mapped: this process' slots, kept by the caller from one round to the next.
        """
        self.folder, self.rank, self.timeout_seconds = folder, rank, timeout_seconds
        self._mapped = {} if mapped is None else mapped

    def allocate(self, bucket: int, receiver: int, num_bytes: int) -> Tensor:
        """A slot."""
        return self._slot(bucket, self.rank, receiver, num_bytes)

    def post(self, bucket: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> Pending:
        """Publish this rank's messages."""
        for receiver, message in outgoing.items():
            file = self._file(bucket, self.rank, receiver)
            partial = file.with_suffix(".partial")
            partial.write_text(str(len(message)))
            partial.rename(file)
        return _Published(self, bucket, list(outgoing), dict(incoming))

    def message(self, bucket: int, sender: int, num_bytes: int) -> Tensor:
        """Wait for a message to this rank, of at most num_bytes.

        Raises:
            TransferError: it takes longer than the time limit, is longer, or a peer has failed.
        """
        sent = int(self.wait(bucket, sender, self.rank, exists=True).read_text())
        if sent > num_bytes:
            raise TransferError(
                f"weights from rank {sender}, bucket {bucket}: {sent} bytes, expected at most {num_bytes}"
            )
        return self._slot(bucket, sender, self.rank, sent)

    def wait(self, bucket: int, sender: int, receiver: int, *, exists: bool) -> Path:
        """Wait until a message exists or is gone.

        Raises:
            TransferError: it takes longer than the time limit, or a peer has failed.
        """
        file = self._file(bucket, sender, receiver)
        deadline = time.monotonic() + self.timeout_seconds
        while file.exists() != exists:
            way = f"weights from rank {sender} to rank {receiver}, bucket {bucket}"
            if (failure := self.failure()) is not None:
                raise TransferError(f"{way}: given up: {failure}")
            if time.monotonic() > deadline:
                late = f"rank {sender} has not sent" if exists else f"rank {receiver} has not taken"
                raise TransferError(f"{way}: {late} them within {self.timeout_seconds:g} s")
            time.sleep(_POLL_SECONDS)
        return file

    def fail(self, reason: str) -> None:
        """End the waits of all ranks."""
        if not self.folder.exists():
            return  # the round is over
        partial = self.folder / f".{_FAILED}.{self.rank}"
        partial.write_text(reason)
        partial.rename(self.folder / _FAILED)

    def close(self) -> None:
        """Nothing: the folder belongs to the trained ranks."""

    def failure(self) -> str | None:
        """Why a peer has given up, if one has."""
        try:
            return (self.folder / _FAILED).read_text()
        except FileNotFoundError:
            return None if self.folder.exists() else "the folder is gone"

    def _file(self, bucket: int, sender: int, receiver: int) -> Path:
        return self.folder / f"{bucket}.{sender}.{receiver}"

    def _slot(self, bucket: int, sender: int, receiver: int, num_bytes: int) -> Tensor:
        path = str(self.folder.parent / f"slot{bucket % 2}.{sender}.{receiver}")
        slot = self._mapped.get(path)
        if slot is None or len(slot) < num_bytes:
            # A larger mapping of the same file: it grows, and what both sides have mapped before stays what it is.
            slot = self._mapped[path] = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
        return slot[:num_bytes]


class _Published:
    def __init__(self, transport: FolderTransport, bucket: int, receivers: list[int], incoming: dict[int, int]) -> None:
        self._transport, self._bucket = transport, bucket
        self._receivers, self._incoming = receivers, incoming

    def arrived(self, sender: int) -> Tensor:
        return self._transport.message(self._bucket, sender, self._incoming[sender])

    def loaded(self, sender: int) -> None:
        self._transport.wait(self._bucket, sender, self._transport.rank, exists=True).unlink()

    def sent(self) -> None:
        for receiver in self._receivers:
            self._transport.wait(self._bucket, self._transport.rank, receiver, exists=False)
