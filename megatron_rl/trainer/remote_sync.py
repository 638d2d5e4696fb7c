"""Policy to engines in processes of their own: the same plan, by way of a folder or the network; engines come back.

A round that fails anywhere fails everywhere: then engines that are dead or do not answer are started again, and the
whole round is repeated, with all elements of all weights. An engine that has not loaded all of a version, each message
of which proves itself, is not resumed; so none serves a mixture of versions.
"""

import shutil
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.schema import SyncConfig, SyncTransport
from megatron_rl.engine.policy import Policy
from megatron_rl.rollout.address import LOOPBACK, EngineLost
from megatron_rl.rollout.remote import NoEngine, RemoteEngine
from megatron_rl.weights.exchange import Exchange, verified
from megatron_rl.weights.folder import FolderTransport
from megatron_rl.weights.fp8_parameters import held_value
from megatron_rl.weights.holders import EngineRanks
from megatron_rl.weights.messages import TransferError
from megatron_rl.weights.orders import Orders
from megatron_rl.weights.shard_plan import ShardPlan
from megatron_rl.weights.sockets import Door, SocketTransport, connect

_ROUNDS = 3

_T = TypeVar("_T")


class RemoteSync:
    """Sends the policy to all engines; each is driven by one of the trained ranks."""

    def __init__(
        self,
        policy: Policy,
        plan: ShardPlan,
        engines: EngineRanks,
        config: SyncConfig,
        *,
        engine: RemoteEngine | NoEngine,
        number: int | None,
    ) -> None:
        """Collective.

        Args:
            policy: what is sent.
            plan: from its ranks to the engines'.
            engines: the ranks of the engines in the plan.
            config: limits, verification, and the way that weights take.
            engine: that this rank drives, if it does; else it only sends.
            number: of that engine.
        """
        self.policy, self.config, self.engine = policy, config, engine
        self._rank = policy.groups.world.rank()
        self._orders = Orders.of(plan, self._rank, {})
        self._exchange = Exchange(self._orders, max_changed=config.delta)
        self._engine_orders: dict[int, Orders] = {}
        if isinstance(engine, RemoteEngine):
            assert number is not None
            ranks = engines.engine_ranks(number)
            self._engine_orders = {rank: Orders.of(plan, rank, engines.expert_rows(rank)) for rank in ranks}
        self._doors: dict[int, Door] = {}
        """Of the engine that this rank drives, once it has its orders."""
        self._mapped: dict[str, Tensor] = {}
        self.folder = engine.folder if self._share_a_folder() else None
        """Through which weights pass; None: over the network."""
        self._round_number = 0

    @property
    def sent_bytes(self) -> int:
        """Bytes of messages that this rank has sent in the last synchronisation."""
        return self._exchange.sent_bytes

    def __call__(self, version: int) -> None:
        """Bring every engine to the policy's present weights; collective.

        Raises:
            TransferError: it failed several times; what each rank saw is in the message.
        """
        for _ in range(_ROUNDS):
            failures = self._round(version)
            if not failures:
                return
            self._exchange.forget()
            self._revive()
        raise TransferError(f"weights of version {version} did not reach the engines: {'; '.join(failures)}")

    def _share_a_folder(self) -> bool:
        if self.config.transport is not SyncTransport.auto:
            return self.config.transport is SyncTransport.folder
        host = None if isinstance(self.engine, NoEngine) else self.engine.server.address.host
        places = self._of_all_ranks((socket.gethostname(), host in (None, LOOPBACK)))
        on_one_machine = len({machine for machine, _ in places}) == 1 and all(nearby for _, nearby in places)
        return on_one_machine or self.config.folder is not None

    def _of_all_ranks(self, mine: _T) -> list[_T]:
        everyone: list[_T] = [mine] * dist.get_world_size(self.policy.groups.world)
        dist.all_gather_object(everyone, mine, group=self.policy.groups.world)
        return everyone

    def _round(self, version: int) -> list[str]:
        """What went wrong, on any rank."""
        self._round_number += 1
        name = f"version_{version}_round_{self._round_number}"
        messages = None if self.folder is None else self.folder / name
        if self._rank == 0 and messages is not None:
            messages.mkdir(parents=True)
        told = self._of_all_ranks(self._give_orders())
        failures = {answer for answer in told if isinstance(answer, str)}
        if not failures:
            doors = {rank: door for answer in told if isinstance(answer, dict) for rank, door in answer.items()}
            failures = {
                failure for failure in self._of_all_ranks(self._send(name, messages, version, doors)) if failure
            }
        if self._rank == 0 and messages is not None:
            shutil.rmtree(messages)
        return sorted(failures)

    def _give_orders(self) -> dict[int, Door] | str:
        """Where the engine's ranks listen; or why it has no orders."""
        if isinstance(self.engine, RemoteEngine) and not self._doors:
            try:
                self._doors = self.engine.give_orders(self._engine_orders, max_changed=self.config.delta)
            except EngineLost as error:
                return str(error)
        return self._doors

    def _send(self, name: str, messages: Path | None, version: int, doors: Mapping[int, Door]) -> str | None:
        """This rank's part of a round; why it has failed, if it has."""
        limit, failure = self.config.timeout_seconds, None
        with ThreadPoolExecutor(max_workers=1) as pool:
            loading = pool.submit(self._load, name, messages, version)
            transport: FolderTransport | SocketTransport | None = None
            try:
                if messages is not None:
                    transport = FolderTransport(messages, self._rank, timeout_seconds=limit, mapped=self._mapped)
                else:
                    mine = {receiver: doors[receiver] for receiver in self._orders.receivers}
                    transport = connect(mine, rank=self._rank, round=name, timeout_seconds=limit)
                policy, check = self.policy, verified(self.config.verify.name, version)
                held = {parameter: held_value(value, policy.dtype) for parameter, value in policy.parameters.items()}
                self._exchange.run(held, None, transport, version=version, verify=check)
                transport.close()
            except TransferError as error:
                failure = str(error)
                if transport is not None:
                    transport.fail(f"rank {self._rank}: {failure}")
            return loading.result() or failure

    def _load(self, name: str, messages: Path | None, version: int) -> str | None:
        if isinstance(self.engine, NoEngine):
            return None
        verify, limit = self.config.verify.name, self.config.timeout_seconds
        try:
            self.engine.load(name, messages, version=version, verify=verify, timeout_seconds=limit)
        except EngineLost as error:
            if messages is not None:
                FolderTransport(messages, self._rank, timeout_seconds=limit).fail(f"rank {self._rank}: {error}")
            return str(error)
        return None

    def _revive(self) -> None:
        if isinstance(self.engine, RemoteEngine) and not self.engine.answers():
            started = time.monotonic()
            self.engine.restart()
            self._doors = {}
            print(f"megatron-rl: an engine had died; started again in {time.monotonic() - started:.0f} s", flush=True)
