"""The sending side of a weight sync to engines in processes of their own: one sender class per `sync.transport`.

    FolderSender         folder: messages are files that both sides see, in shared memory on one machine
    SocketSender         network: each sending rank connects to the endpoints of its receivers over TCP
    ProcessGroupSender   process_group: one group of all trained ranks and all engine ranks, gloo or NCCL

A sender lives as long as the run and opens one transport per round. `sender_of` chooses the class. What `begin` returns
reaches the other side, `_Receiver.transport` in `rollout/worker_extension.py`, as JSON.
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


class RoundTransport(Transport, Protocol):
    """A transport for one round."""

    def fail(self, reason: str) -> None:
        """This rank has failed: end the waits of its peers before their time limit."""
        ...

    def close(self) -> None:
        """The round is over for this rank."""
        ...


class Sender(Protocol):
    """A trained rank's side of one transport, for all rounds."""

    def begin(self, name: str) -> dict[str, Any]:
        """Prepare a round; what engines need to open their side, to be sent as JSON."""
        ...

    def open(self, name: str, endpoints: Mapping[int, Endpoint]) -> RoundTransport:
        """This rank's transport of the round, to the endpoints of its receivers. Raises TransferError."""
        ...

    def engine_lost(self, name: str, reason: str) -> None:
        """The engine that this rank drives will not load what is sent."""
        ...

    def end(self, name: str, *, failed: bool) -> None:
        """All trained ranks are done with the round; `failed`: on any of them."""
        ...


class FolderSender:
    """Messages are files in a folder."""

    def __init__(self, folder: Path, rank: int, timeout_seconds: float) -> None:
        self._folder, self._rank, self._timeout_seconds = folder, rank, timeout_seconds
        self._mapped: dict[str, Tensor] = {}

    def begin(self, name: str) -> dict[str, Any]:
        if self._rank == 0:
            (self._folder / name).mkdir(parents=True)
        return {"folder": str(self._folder / name)}

    def open(self, name: str, endpoints: Mapping[int, Endpoint]) -> RoundTransport:
        folder, limit = self._folder / name, self._timeout_seconds
        return FolderTransport(folder, self._rank, timeout_seconds=limit, mapped=self._mapped)

    def engine_lost(self, name: str, reason: str) -> None:
        self.open(name, {}).fail(reason)

    def end(self, name: str, *, failed: bool) -> None:
        if self._rank == 0:
            shutil.rmtree(self._folder / name)


class SocketSender:
    """Messages go over TCP, from senders to receivers."""

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self._rank, self._timeout_seconds = rank, timeout_seconds

    def begin(self, name: str) -> dict[str, Any]:
        return {}

    def open(self, name: str, endpoints: Mapping[int, Endpoint]) -> RoundTransport:
        return connect(endpoints, rank=self._rank, round=name, timeout_seconds=self._timeout_seconds)

    def engine_lost(self, name: str, reason: str) -> None:
        """Nothing to do: its connections are closed, or were never made."""

    def end(self, name: str, *, failed: bool) -> None:
        """Nothing to do."""


class ProcessGroupSender:
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

    def open(self, name: str, endpoints: Mapping[int, Endpoint]) -> RoundTransport:
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
        """Nothing to do: ranks of a group wait for a peer until the time limit."""

    def end(self, name: str, *, failed: bool) -> None:
        if failed:
            self._name = self._group = None


def sender_of(
    config: SyncConfig, engine: RemoteEngine | NoEngine, world: ProcessGroup, engine_ranks: Collection[int]
) -> Sender:
    """The sender for `sync.transport`; collective.

    auto: a folder where `sync.folder` is set, or all ranks and engines are on one machine without GPUs; a process group
    between GPUs, unless `sync.delta` is set: the length of a message of changes is known to its sender alone, and a
    process group's receiver must know it. Else the network.
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
        return ProcessGroupSender(world, len(engine_ranks), config.timeout_seconds)
    if transport is SyncTransport.network:
        return SocketSender(world.rank(), config.timeout_seconds)
    return FolderSender(engine.folder, world.rank(), config.timeout_seconds)
