"""What a vLLM worker of a server of its own can be asked to do, over vLLM's `/collective_rpc`.

vLLM adds the class to its worker (`--worker-extension-cls`). A request brings only strings, answers are JSON.
"""

import json
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.rollout.server_guard import TOKEN_VARIABLE
from megatron_rl.rollout.weight_loading import load_shards
from megatron_rl.weights.plan.rank_plan import Orders
from megatron_rl.weights.transport.exchange import Exchange, Loader, OnFilled, verified
from megatron_rl.weights.transport.folder import FolderTransport
from megatron_rl.weights.transport.messages import TransferError
from megatron_rl.weights.transport.process_group import ProcessGroupTransport, join
from megatron_rl.weights.transport.sockets import Listener, SocketTransport

_Transport = FolderTransport | SocketTransport | ProcessGroupTransport


@dataclass
class _Receiver:
    """What a worker keeps between synchronisations."""

    rank: int
    orders: Orders
    exchange: Exchange
    listener: Listener
    mapped: dict[str, Tensor] = field(default_factory=dict)
    group: tuple[str, ProcessGroup] | None = None

    def transport(self, told: dict[str, Any], device: torch.device) -> _Transport:
        """To the trained ranks, for one round."""
        limit, way = told["timeout_seconds"], told["way"]
        if "folder" in way:
            return FolderTransport(Path(way["folder"]), self.rank, timeout_seconds=limit, mapped=self.mapped)
        if "group" in way:
            of, timeout = way["group"], timedelta(seconds=limit)
            if self.group is None or self.group[0] != of["name"]:
                place = (of["host"], of["port"], of["name"])
                group = join(*place, rank=self.rank, size=of["size"], timeout=timeout, device=device)
                self.group = (of["name"], group)
            return ProcessGroupTransport(self.group[1], timeout=timeout, device=device)
        token, name = os.environ[TOKEN_VARIABLE], told["round"]
        senders = self.orders.senders
        return self.listener.accept(senders, rank=self.rank, round=name, token=token, timeout_seconds=limit)


_receiver: list[_Receiver] = []
"""The one of this process, once there is one."""


class WeightSyncExtension:
    """Methods that vLLM adds to its worker."""

    on_filled: OnFilled | None = None
    """See `weight_loading.ShardLoader`."""

    def receive_orders(self, request: str) -> dict[str, Any]:
        """Learn what synchronisations will bring.

        Args:
            request: JSON of `RemoteEngine.give_orders`.

        Returns:
            {"rank", "port"}: of this worker in the plan, and where it listens to trained ranks.
        """
        told = json.loads(request)
        rank = told["first_rank"] + self.rank  # type: ignore[attr-defined]
        orders = Orders.from_text(told["orders"][str(rank)])
        exchange = Exchange(orders, max_changed=told["max_changed"])
        listener = _receiver.pop().listener if _receiver else Listener(told["host"])
        _receiver.append(_Receiver(rank, orders, exchange, listener))
        return {"rank": rank, "port": listener.port}

    def load_trained_shards(self, request: str) -> dict[str, Any]:
        """Load one version from the trainers; the scheduler is paused.

        Args:
            request: JSON of `RemoteEngine.load`.

        Returns:
            {"rank"} if it is loaded, else {"rank", "error"}: the engine has no usable weights then.
        """
        told, (receiver,) = json.loads(request), _receiver
        transport: _Transport | None = None
        try:
            transport = receiver.transport(told, self.device)  # type: ignore[attr-defined]
            messages = transport

            def feed(loader: Loader) -> None:
                check = verified(told["verify"], told["version"])
                receiver.exchange.run({}, loader, messages, version=told["version"], verify=check)

            load_shards(self, receiver.orders.shard, feed, self.on_filled)
        except TransferError as error:
            if transport is not None:
                transport.fail(f"rank {receiver.rank}: {error}")
            return {"rank": receiver.rank, "error": str(error)}
        transport.close()
        return {"rank": receiver.rank}
