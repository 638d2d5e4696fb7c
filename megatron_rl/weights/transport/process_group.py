"""Messages of an exchange over a torch.distributed process group: gloo between CPUs, NCCL between GPUs.

The group may be a part of the trained ranks' world, or, with engines in processes of their own, one that is made beside
both sides' worlds (`join`), whose ranks are those of the plan. Tensors stay on their devices, and NCCL chooses
how two GPUs communicate: NVLink and CUDA IPC within a node, the network between nodes.

None of this has been run over NCCL.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.weights.transport.exchange import Pending
from megatron_rl.weights.transport.messages import TransferError

_GlooOptions: Any = dist.ProcessGroupGloo._Options  # type: ignore[attr-defined]


class ProcessGroupTransport:
    """Point-to-point messages in a group whose ranks are those of the plan; all of a message's bytes are known."""

    def __init__(self, group: ProcessGroup, *, timeout: timedelta, device: torch.device | None = None) -> None:
        self.group, self.timeout = group, timeout
        self._device = device or torch.device("cpu")
        if self._device.type == "cuda":
            _meet(group, self._device, timeout)

    def allocate(self, bucket: int, receiver: int, num_bytes: int) -> Tensor:
        """Memory on the group's device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def post(self, bucket: int, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> Pending:
        """Begin to send and to receive."""
        buffers = {sender: self.allocate(bucket, sender, num_bytes) for sender, num_bytes in incoming.items()}
        together = self._device.type == "cuda" and bool(buffers or outgoing)
        try:
            if together:  # NCCL's messages of one bucket, in either direction, begin as one
                self.group._start_coalescing(self._device)
            works = [self.group.recv([buffer], sender, bucket) for sender, buffer in buffers.items()]
            works += [self.group.send([message], receiver, bucket) for receiver, message in outgoing.items()]
            if together:
                works = [self.group._end_coalescing(self._device)] * len(works)
        except RuntimeError as error:
            peers = sorted({*buffers, *outgoing})
            raise TransferError(f"weights of bucket {bucket}: a peer of {peers} is gone: {_line(error)}") from None
        return _Posted(bucket, buffers, dict(outgoing), works, self.timeout)

    def fail(self, reason: str) -> None:
        """The group is not used again; peers notice by its closed connections, or after their time limits."""

    def close(self) -> None:
        """Nothing: the group serves the next round too."""


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
            raise TransferError(
                f"weights {peer}, bucket {self._bucket}: not done within {limit}: {_line(error)}"
            ) from None


def join(
    host: str, port: int, name: str, *, rank: int, size: int, timeout: timedelta, device: torch.device
) -> ProcessGroup:
    """A process group beside torch.distributed's world; every rank of it calls this.

    Args:
        host, port: of the store where the ranks meet.
        name: of the group, used once; it has the token in it, so that nobody else finds it in the store.
        rank, size: of this process in the group.
        timeout: for all to come.
        device: NCCL for one of CUDA, else gloo.

    Raises:
        TransferError: not all have come in time.
    """
    try:
        store = dist.PrefixStore(name, dist.TCPStore(host, port, is_master=False, timeout=timeout))
        group = ProcessGroup(store, rank, size)
        backend: Any
        if device.type == "cuda":
            kind = ProcessGroup.BackendType.NCCL
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            backend = dist.ProcessGroupNCCL(store, rank, size, nccl)
        else:
            kind = ProcessGroup.BackendType.GLOO
            gloo = _GlooOptions()
            gloo._timeout = timeout
            # Connections to peers are made when they are first needed.
            local = host in ("127.0.0.1", "localhost")
            create: Any = dist.ProcessGroupGloo.create_device if local else dist.ProcessGroupGloo.create_default_device
            gloo._devices = [create(**({"hostname": host} if local else {}), lazy_init=True)]
            backend = dist.ProcessGroupGloo(store, rank, size, gloo)
        backend._set_sequence_number_for_group()
        group._set_default_backend(kind)
        group._register_backend(device, kind, backend)
        _meet(group, device, timeout)
    except RuntimeError as error:
        limit = f"{timeout.total_seconds():g} s"
        raise TransferError(f"rank {rank}: not all {size} ranks have met within {limit}: {_line(error)}") from None
    return group


def _meet(group: ProcessGroup, device: torch.device, timeout: timedelta) -> None:
    """Wait for all ranks of the group; collective.

    Not `barrier`, which guesses a device. And NCCL makes a group's communicator at its first use, with all ranks: if
    that were a bucket's messages, a rank without any would leave the others waiting.
    """
    group.allreduce([torch.zeros(1, device=device)]).wait(timeout)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
