"""Weight sync to engines in processes of their own, in rounds that are repeated after a failure.

A round: give each engine rank its rank plan if it has none, open the transport (`transports.py`), send, load. A round
that fails on one rank fails on all: engines that are dead or do not answer are restarted, and the round is repeated
with all elements of all weights. An engine that has not loaded a whole version is not resumed, so no engine serves a
mixture of versions.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rl.config.schema import SyncConfig
from megatron_rl.engine.policy import Policy
from megatron_rl.parallel.meeting import Meeting
from megatron_rl.rollout.address import EngineLost
from megatron_rl.rollout.remote import NoEngine, RemoteEngine
from megatron_rl.sync.transports import RoundTransport, sender_of
from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.plan.ranks import EngineRanks
from megatron_rl.weights.plan.shard_plan import ShardPlan
from megatron_rl.weights.quantized.fp8_parameters import dequantized
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
        meeting: Meeting,
    ) -> None:
        """Collective.

        Args:
            policy: what is sent.
            plan: from its ranks to the engines'.
            engines: the ranks of the engines in the plan.
            config: limits, verification and transport.
            engine: that this rank drives, if it does; else it only sends.
            number: of that engine.
            meeting: where ranks wait for those that start an engine again.
        """
        self.policy, self.config, self.engine, self._meeting = policy, config, engine, meeting
        self._rank = policy.groups.world.rank()
        self._rank_plan = RankPlan.of(plan, self._rank, {})
        self._exchange = Exchange(self._rank_plan, max_changed=config.delta)
        self._engine_rank_plans: dict[int, RankPlan] = {}
        if isinstance(engine, RemoteEngine):
            assert number is not None
            ranks = engines.engine_ranks(number)
            self._engine_rank_plans = {rank: RankPlan.of(plan, rank, engines.expert_rows(rank)) for rank in ranks}
        self._endpoints: dict[int, Endpoint] = {}
        """Of the engine that this rank drives, once it has its rank plans."""
        world = policy.groups.world
        self._sender = sender_of(
            config, engine, world, range(engines.first_rank, engines.first_rank + engines.world_size)
        )
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
            self._meeting.wait("restart of the engines")
        raise TransferError(f"weights of version {version} did not reach the engines: {'; '.join(failures)}")

    def _of_all_ranks(self, mine: _T) -> list[_T]:
        everyone: list[_T] = [mine] * dist.get_world_size(self.policy.groups.world)
        dist.all_gather_object(everyone, mine, group=self.policy.groups.world)
        return everyone

    def _round(self, version: int) -> list[str]:
        """What went wrong, on any rank."""
        self._round_number += 1
        name = f"version_{version}_round_{self._round_number}"
        receiving = self._sender.begin(name)
        answers = self._of_all_ranks(self._find_endpoints())
        failures = {answer for answer in answers if isinstance(answer, str)}
        if not failures:
            endpoints = {
                rank: endpoint for answer in answers if isinstance(answer, dict) for rank, endpoint in answer.items()
            }
            failures = {
                failure for failure in self._of_all_ranks(self._send(name, receiving, version, endpoints)) if failure
            }
        self._sender.end(name, failed=bool(failures))
        return sorted(failures)

    def _find_endpoints(self) -> dict[int, Endpoint] | str:
        """Where the engine's ranks listen; or why it cannot load, before anybody waits for it."""
        if not isinstance(self.engine, RemoteEngine):
            return {}
        try:
            if not self._endpoints:
                self._endpoints = self.engine.set_rank_plans(self._engine_rank_plans, max_changed=self.config.delta)
            elif not self.engine.answers():
                return f"engine at {self.engine.server.address.host} port {self.engine.server.address.port}: no answer"
        except EngineLost as error:
            return str(error)
        return self._endpoints

    def _send(
        self, name: str, receiving: dict[str, Any], version: int, endpoints: Mapping[int, Endpoint]
    ) -> str | None:
        """This rank's part of a round; why it has failed, if it has."""
        failure: str | None = None
        with ThreadPoolExecutor(max_workers=1) as pool:
            loading = pool.submit(self._load, name, receiving, version)
            transport: RoundTransport | None = None
            try:
                transport = self._sender.open(name, {rank: endpoints[rank] for rank in self._rank_plan.receivers})
                policy, check = self.policy, verified(self.config.verify.name, version)
                values = {name: dequantized(parameter, policy.dtype) for name, parameter in policy.parameters.items()}
                self._exchange.run(values, None, transport, version=version, verify=check)
                transport.close()
            except TransferError as error:
                failure = str(error)
                if transport is not None:
                    transport.fail(f"rank {self._rank}: {failure}")
            return loading.result() or failure

    def _load(self, name: str, receiving: dict[str, Any], version: int) -> str | None:
        if isinstance(self.engine, NoEngine):
            return None
        verify, limit = self.config.verify.name, self.config.timeout_seconds
        try:
            self.engine.load(name, receiving, version=version, verify=verify, timeout_seconds=limit)
        except EngineLost as error:
            self._sender.engine_lost(name, f"rank {self._rank}: {error}")
            return str(error)
        return None

    def _revive(self) -> None:
        if isinstance(self.engine, RemoteEngine) and not self.engine.answers():
            started = time.monotonic()
            self.engine.restart(self._meeting.progressed)
            self._endpoints = {}
            print(f"megatron-rl: an engine had died; started again in {time.monotonic() - started:.0f} s", flush=True)
