"""The worker extension of an engine's server: the methods that trained ranks call in vLLM's workers to sync weights.

vLLM adds `WeightSyncExtension` to its worker class (`--worker-extension-cls`); `RemoteEngine` calls its methods over
vLLM's `/collective_rpc`. A request carries one string of JSON; answers are JSON.

    set_rank_plan         once for each start of the server: which slices will come from which ranks; opens a listener
    load_trained_shards   once for each round: receive one version and load it
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
from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.transport.exchange import Exchange, Loader, OnFilled, verified
from megatron_rl.weights.transport.folder import FolderTransport
from megatron_rl.weights.transport.messages import TransferError
from megatron_rl.weights.transport.process_group import ProcessGroupTransport, join
from megatron_rl.weights.transport.sockets import Listener, SocketTransport

_Transport = FolderTransport | SocketTransport | ProcessGroupTransport


@dataclass
class _Receiver:
    """The receiving side of a worker, kept from one synchronisation to the next."""

    rank: int
    rank_plan: RankPlan
    exchange: Exchange
    listener: Listener
    mapped: dict[str, Tensor] = field(default_factory=dict)
    group: tuple[str, ProcessGroup] | None = None

    def transport(self, request: dict[str, Any], device: torch.device) -> _Transport:
        """The transport from the trained ranks, for one round. `request`: that of `load_trained_shards`."""
        limit, transport = request["timeout_seconds"], request["transport"]
        if "folder" in transport:
            return FolderTransport(Path(transport["folder"]), self.rank, timeout_seconds=limit, mapped=self.mapped)
        if "group" in transport:
            of, timeout = transport["group"], timedelta(seconds=limit)
            if self.group is None or self.group[0] != of["name"]:
                place = (of["host"], of["port"], of["name"])
                group = join(*place, rank=self.rank, size=of["size"], timeout=timeout, device=device)
                self.group = (of["name"], group)
            return ProcessGroupTransport(self.group[1], timeout=timeout, device=device)
        token, name = os.environ[TOKEN_VARIABLE], request["round"]
        senders = self.rank_plan.senders
        return self.listener.accept(senders, rank=self.rank, round=name, token=token, timeout_seconds=limit)


_receiver: list[_Receiver] = []
"""The one of this process, once there is one."""


class WeightSyncExtension:
    """Methods that vLLM adds to its worker."""

    on_filled: OnFilled | None = None
    """See `weight_loading.ShardLoader`."""

    def set_rank_plan(self, request: str) -> dict[str, Any]:
        """Take this worker's rank plan, by which every later synchronisation goes.

        Args:
            request: JSON of `RemoteEngine.set_rank_plans`.

        Returns:
            {"rank", "port"}: of this worker in the plan, and where it listens to trained ranks.
        """
        given = json.loads(request)
        rank = given["first_rank"] + self.rank  # type: ignore[attr-defined]
        rank_plan = RankPlan.from_text(given["rank_plans"][str(rank)])
        exchange = Exchange(rank_plan, max_changed=given["max_changed"])
        listener = _receiver.pop().listener if _receiver else Listener(given["host"])
        _receiver.append(_Receiver(rank, rank_plan, exchange, listener))
        return {"rank": rank, "port": listener.port}

    def load_trained_shards(self, request: str) -> dict[str, Any]:
        """Load one version from the trainers; the scheduler is paused.

        Args:
            request: JSON of `RemoteEngine.load`.

        Returns:
            {"rank"} if it is loaded, else {"rank", "error"}: the engine has no usable weights then.
        """
        given, (receiver,) = json.loads(request), _receiver
        transport: _Transport | None = None
        try:
            transport = receiver.transport(given, self.device)  # type: ignore[attr-defined]
            messages = transport

            def feed(loader: Loader) -> None:
                check = verified(given["verify"], given["version"])
                receiver.exchange.run({}, loader, messages, version=given["version"], verify=check)

            load_shards(self, receiver.rank_plan.shard, feed, self.on_filled)
        except TransferError as error:
            if transport is not None:
                transport.fail(f"rank {receiver.rank}: {error}")
            return {"rank": receiver.rank, "error": str(error)}
        transport.close()
        return {"rank": receiver.rank}
