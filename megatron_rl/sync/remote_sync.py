"""Policy to engines in processes of their own: the same plan, by one of several ways (`ways.py`); engines come back.

A round that fails anywhere fails everywhere: then engines that are dead or do not answer are started again, and the
whole round is repeated, with all elements of all weights. An engine that has not loaded all of a version, each message
of which proves itself, is not resumed; so none serves a mixture of versions.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rl.config.schema import SyncConfig
from megatron_rl.engine.policy import Policy
from megatron_rl.rollout.address import EngineLost
from megatron_rl.rollout.remote import NoEngine, RemoteEngine
from megatron_rl.sync.transports import OpenTransport, way_of
from megatron_rl.weights.plan.rank_plan import Orders
from megatron_rl.weights.plan.ranks import EngineRanks
from megatron_rl.weights.plan.shard_plan import ShardPlan
from megatron_rl.weights.quantized.fp8_parameters import held_value
from megatron_rl.weights.transport.exchange import Exchange, verified
from megatron_rl.weights.transport.messages import TransferError
from megatron_rl.weights.transport.sockets import Endpoint

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
        self._endpoints: dict[int, Endpoint] = {}
        """Of the engine that this rank drives, once it has its orders."""
        world = policy.groups.world
        self._way = way_of(config, engine, world, range(engines.first_rank, engines.first_rank + engines.world_size))
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

    def _of_all_ranks(self, mine: _T) -> list[_T]:
        everyone: list[_T] = [mine] * dist.get_world_size(self.policy.groups.world)
        dist.all_gather_object(everyone, mine, group=self.policy.groups.world)
        return everyone

    def _round(self, version: int) -> list[str]:
        """What went wrong, on any rank."""
        self._round_number += 1
        name = f"version_{version}_round_{self._round_number}"
        told = self._way.begin(name)
        answers = self._of_all_ranks(self._give_orders())
        failures = {answer for answer in answers if isinstance(answer, str)}
        if not failures:
            endpoints = {
                rank: endpoint for answer in answers if isinstance(answer, dict) for rank, endpoint in answer.items()
            }
            failures = {
                failure for failure in self._of_all_ranks(self._send(name, told, version, endpoints)) if failure
            }
        self._way.end(name, failed=bool(failures))
        return sorted(failures)

    def _give_orders(self) -> dict[int, Endpoint] | str:
        """Where the engine's ranks listen; or why it cannot load, before anybody waits for it."""
        if not isinstance(self.engine, RemoteEngine):
            return {}
        try:
            if not self._endpoints:
                self._endpoints = self.engine.give_orders(self._engine_orders, max_changed=self.config.delta)
            elif not self.engine.answers():
                return f"engine at {self.engine.server.address.host} port {self.engine.server.address.port}: no answer"
        except EngineLost as error:
            return str(error)
        return self._endpoints

    def _send(self, name: str, told: dict[str, Any], version: int, endpoints: Mapping[int, Endpoint]) -> str | None:
        """This rank's part of a round; why it has failed, if it has."""
        failure: str | None = None
        with ThreadPoolExecutor(max_workers=1) as pool:
            loading = pool.submit(self._load, name, told, version)
            transport: OpenTransport | None = None
            try:
                transport = self._way.open(name, {rank: endpoints[rank] for rank in self._orders.receivers})
                policy, check = self.policy, verified(self.config.verify.name, version)
                held = {parameter: held_value(value, policy.dtype) for parameter, value in policy.parameters.items()}
                self._exchange.run(held, None, transport, version=version, verify=check)
                transport.close()
            except TransferError as error:
                failure = str(error)
                if transport is not None:
                    transport.fail(f"rank {self._rank}: {failure}")
            return loading.result() or failure

    def _load(self, name: str, told: dict[str, Any], version: int) -> str | None:
        if isinstance(self.engine, NoEngine):
            return None
        verify, limit = self.config.verify.name, self.config.timeout_seconds
        try:
            self.engine.load(name, told, version=version, verify=verify, timeout_seconds=limit)
        except EngineLost as error:
            self._way.engine_lost(name, f"rank {self._rank}: {error}")
            return str(error)
        return None

    def _revive(self) -> None:
        if isinstance(self.engine, RemoteEngine) and not self.engine.answers():
            started = time.monotonic()
            self.engine.restart()
            self._endpoints = {}
            print(f"megatron-rl: an engine had died; started again in {time.monotonic() - started:.0f} s", flush=True)
