"""Messages of an exchange over a torch.distributed process group: gloo between CPUs, NCCL between GPUs.

NCCL has not been tried.
"""

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.weights.exchange import Pending
from megatron_rl.weights.messages import TransferError


class ProcessGroupTransport:
    """Point-to-point messages in a group whose ranks are those of the plan."""

    def __init__(self, group: ProcessGroup, *, timeout: timedelta, device: torch.device | None = None) -> None:
        self.group, self.timeout = group, timeout
        self._device = device or torch.device("cpu")

    def allocate(self, bucket: int, receiver: int, num_bytes: int) -> Tensor:
        """Memory on the group's device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def post(self, bucket: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> Pending:
        """Begin to send and to receive."""
        buffers = {
            sender: torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            for sender, num_bytes in incoming.items()
        }
        peers = [*buffers, *outgoing]
        operations = [
            dist.P2POp(dist.irecv, buffer, group=self.group, tag=bucket, group_peer=sender)
            for sender, buffer in buffers.items()
        ] + [
            dist.P2POp(dist.isend, message, group=self.group, tag=bucket, group_peer=receiver)
            for receiver, message in outgoing.items()
        ]
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise TransferError(
                f"weights of bucket {bucket}: a peer of {sorted(set(peers))} is gone: {error}"
            ) from None
        return _Posted(bucket, buffers, dict(outgoing), works, self.timeout)


class _Posted:
    def __init__(
        self,
        bucket: int,
        buffers: dict[int, Tensor],
        outgoing: dict[int, Tensor],
        works: list[dist.Work],
        timeout: timedelta,
    ) -> None:
        self._bucket, self._buffers, self._outgoing, self._timeout = bucket, buffers, outgoing, timeout
        if len(works) < len(buffers) + len(outgoing):  # NCCL answers for the batch as a whole
            works = works * (len(buffers) + len(outgoing))
        self._receiving = dict(zip(buffers, works, strict=False))
        self._sending = dict(zip(outgoing, works[len(buffers) :], strict=True))

    def arrived(self, sender: int) -> Tensor:
        self._wait(self._receiving.pop(sender), f"from rank {sender}")
        return self._buffers.pop(sender)

    def loaded(self, sender: int) -> None:
        """Each message has memory of its own."""

    def sent(self) -> None:
        for receiver, work in self._sending.items():
            self._wait(work, f"to rank {receiver}")
        self._outgoing.clear()

    def _wait(self, work: dist.Work, peer: str) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            limit = f"{self._timeout.total_seconds():g} s"
            reason = str(error).splitlines()[0]
            raise TransferError(f"weights {peer}, bucket {self._bucket}: not done within {limit}: {reason}") from None
