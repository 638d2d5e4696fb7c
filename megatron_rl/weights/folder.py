"""Messages of an exchange through files: shared memory where the folder is in /dev/shm, a file system otherwise.

    sender    maps <name>.partial, fills it in place, renames it to <name>
    receiver  waits for <name>, maps it, removes it: on Linux the mapping outlives the name

A sender waits until its message is gone before it makes the next but one, so that two buckets exist at most. A file
`failed` ends every wait with the words that it holds: a peer has given up, and nobody waits out the time limit.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.weights.exchange import Pending, TransferError

_POLL_SECONDS = 0.0005
_FAILED = "failed"


class FolderTransport:
    """Messages between ranks that share a folder, which is of one synchronisation alone."""

    def __init__(self, folder: Path, rank: int, *, timeout_seconds: float) -> None:
        self.folder, self.rank, self.timeout_seconds = folder, rank, timeout_seconds

    def allocate(self, bucket: int, receiver: int, num_bytes: int) -> Tensor:
        """A mapped file."""
        return _mapped(self._partial(bucket, receiver), num_bytes)

    def post(self, bucket: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> Pending:
        """Publish this rank's messages."""
        for receiver in outgoing:
            self._partial(bucket, receiver).rename(self._file(bucket, self.rank, receiver))
        return _Published(self, bucket, list(outgoing), dict(incoming))

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
        partial = self.folder / f".{_FAILED}.{self.rank}"
        partial.write_text(reason)
        partial.rename(self.folder / _FAILED)

    def failure(self) -> str | None:
        """Why a peer has given up, if one has."""
        try:
            return (self.folder / _FAILED).read_text()
        except FileNotFoundError:
            return None if self.folder.exists() else "the folder is gone"

    def _file(self, bucket: int, sender: int, receiver: int) -> Path:
        return self.folder / f"{bucket}.{sender}.{receiver}"

    def _partial(self, bucket: int, receiver: int) -> Path:
        return self.folder / f"{bucket}.{self.rank}.{receiver}.partial"


class _Published:
    def __init__(self, transport: FolderTransport, bucket: int, receivers: list[int], incoming: dict[int, int]) -> None:
        self._transport, self._bucket = transport, bucket
        self._receivers, self._incoming = receivers, incoming

    def arrived(self, sender: int) -> Tensor:
        file = self._transport.wait(self._bucket, sender, self._transport.rank, exists=True)
        num_bytes, expected = file.stat().st_size, self._incoming[sender]
        if num_bytes != expected:
            raise TransferError(f"weights from rank {sender}, bucket {self._bucket}: {num_bytes} bytes, not {expected}")
        message = _mapped(file, num_bytes)
        file.unlink()
        return message

    def sent(self) -> None:
        for receiver in self._receivers:
            self._transport.wait(self._bucket, self._transport.rank, receiver, exists=False)


def _mapped(file: Path, num_bytes: int) -> Tensor:
    return torch.from_file(str(file), shared=True, size=num_bytes, dtype=torch.uint8)
