"""The ways that weights take from trained ranks to engines in processes of their own, seen from a trained rank.

    folder          messages are files that all sides see: shared memory on one machine
    network         each sender connects to the endpoints of its receivers, by TCP
    process_group   one group of all trained ranks and all engines' ranks, gloo's or NCCL's

`rollout/worker_extension.py` is the other end: what a way tells engines comes to `_Receiver.transport` there.
"""

import os
import secrets
import shutil
import socket
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.config.schema import SyncConfig, SyncTransport
from megatron_rl.device import HAS_CUDA, this_device
from megatron_rl.rollout.address import LOOPBACK
from megatron_rl.rollout.remote import NoEngine, RemoteEngine
from megatron_rl.weights.transport.exchange import Transport
from megatron_rl.weights.transport.folder import FolderTransport
from megatron_rl.weights.transport.process_group import ProcessGroupTransport, join
from megatron_rl.weights.transport.sockets import Endpoint, connect


class OpenTransport(Transport, Protocol):
    """A transport for one round."""

    def fail(self, reason: str) -> None:
        """This rank has given up: peers that wait for it need not wait out their time limit."""
        ...

    def close(self) -> None:
        """The round is over for this rank."""
        ...


class Way(Protocol):
    """One of the ways."""

    def begin(self, name: str) -> dict[str, Any]:
        """Prepare a round; what the engines are told of it, as JSON."""
        ...

    def open(self, name: str, endpoints: Mapping[int, Endpoint]) -> OpenTransport:
        """This rank's transport of the round, to the endpoints of its receivers. Raises TransferError."""
        ...

    def engine_lost(self, name: str, reason: str) -> None:
        """The engine that this rank drives will not load what is sent."""
        ...

    def end(self, name: str, *, failed: bool) -> None:
        """All trained ranks are done with the round; `failed`: on any of them."""
        ...


class ByFolder:
    """Messages are files."""

    def __init__(self, folder: Path, rank: int, timeout_seconds: float) -> None:
        self._folder, self._rank, self._timeout_seconds = folder, rank, timeout_seconds
        self._mapped: dict[str, Tensor] = {}

    def begin(self, name: str) -> dict[str, Any]:
        if self._rank == 0:
            (self._folder / name).mkdir(parents=True)
        return {"folder": str(self._folder / name)}

    def open(self, name: str, endpoints: Mapping[int, Endpoint]) -> OpenTransport:
        folder, limit = self._folder / name, self._timeout_seconds
        return FolderTransport(folder, self._rank, timeout_seconds=limit, mapped=self._mapped)

    def engine_lost(self, name: str, reason: str) -> None:
        self.open(name, {}).fail(reason)

    def end(self, name: str, *, failed: bool) -> None:
        if self._rank == 0:
            shutil.rmtree(self._folder / name)


class ByNetwork:
    """Senders connect to receivers."""

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self._rank, self._timeout_seconds = rank, timeout_seconds

    def begin(self, name: str) -> dict[str, Any]:
        return {}

    def open(self, name: str, endpoints: Mapping[int, Endpoint]) -> OpenTransport:
        return connect(endpoints, rank=self._rank, round=name, timeout_seconds=self._timeout_seconds)

    def engine_lost(self, name: str, reason: str) -> None:
        """Its connections are closed, or never come about."""

    def end(self, name: str, *, failed: bool) -> None:
        """Nothing is left."""


class ByGroup:
    """One process group, made in the first round and again after one that has failed."""

    def __init__(self, world: ProcessGroup, num_engine_ranks: int, timeout_seconds: float) -> None:
        """Collective over `world`, the trained ranks; the first of them has the store where all ranks meet."""
        self._rank, self._size = world.rank(), world.size() + num_engine_ranks
        self._timeout = timedelta(seconds=timeout_seconds)
        place: list[Any] = [None]
        if self._rank == 0:
            host = os.environ.get("MASTER_ADDR", LOOPBACK)
            family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((host, 0), family=family)
            place[0] = (host, listener.getsockname()[1], secrets.token_urlsafe(32))
            self._store = dist.TCPStore(
                host, place[0][1], is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        dist.broadcast_object_list(place, src=0, group=world)
        self._host, self._port, self._token = place[0]
        self._name: str | None = None
        self._group: ProcessGroup | None = None

    def begin(self, name: str) -> dict[str, Any]:
        self._name = self._name or f"{self._token}/{name}"
        return {"group": {"host": self._host, "port": self._port, "name": self._name, "size": self._size}}

    def open(self, name: str, endpoints: Mapping[int, Endpoint]) -> OpenTransport:
        assert self._name is not None
        if self._group is None:
            self._group = join(
                self._host,
                self._port,
                self._name,
                rank=self._rank,
                size=self._size,
                timeout=self._timeout,
                device=this_device(),
            )
        return ProcessGroupTransport(self._group, timeout=self._timeout, device=this_device())

    def engine_lost(self, name: str, reason: str) -> None:
        """Nothing: a peer of a group is waited for until the time limit."""

    def end(self, name: str, *, failed: bool) -> None:
        if failed:
            self._name = self._group = None


def way_of(
    config: SyncConfig, engine: RemoteEngine | NoEngine, world: ProcessGroup, engine_ranks: Collection[int]
) -> Way:
    """The way that `sync.transport` chooses; collective.

    auto: a folder where all ranks and engines are on one machine without GPUs, or where one is named; from GPU to GPU
    a process group, but for changed elements alone, whose number only the network's messages can tell.
    """
    transport = config.transport
    if transport is SyncTransport.auto:
        host = None if isinstance(engine, NoEngine) else engine.server.address.host
        places: list[Any] = [None] * world.size()
        dist.all_gather_object(places, (socket.gethostname(), host in (None, LOOPBACK)), group=world)
        on_one_machine = len({machine for machine, _ in places}) == 1 and all(nearby for _, nearby in places)
        if HAS_CUDA and not config.delta and config.folder is None:
            transport = SyncTransport.process_group
        else:
            near = on_one_machine or config.folder is not None
            transport = SyncTransport.folder if near else SyncTransport.network
    if transport is SyncTransport.process_group:
        return ByGroup(world, len(engine_ranks), config.timeout_seconds)
    if transport is SyncTransport.network:
        return ByNetwork(world.rank(), config.timeout_seconds)
    return ByFolder(engine.folder, world.rank(), config.timeout_seconds)
