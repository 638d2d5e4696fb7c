"""Policy to engines in processes of their own: the same plan, by way of a folder; engines that died come back.

A round that fails anywhere fails everywhere: no engine resumes with weights that another rank knows to be incomplete.
Then engines that are dead or do not answer are started again, and the whole round is repeated.
"""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.schema import SyncConfig
from megatron_rl.engine.policy import Policy
from megatron_rl.rollout.address import EngineLost
from megatron_rl.rollout.remote import NoEngine, RemoteEngine
from megatron_rl.weights.exchange import Exchange, Orders, TransferError, verified
from megatron_rl.weights.folder import FolderTransport
from megatron_rl.weights.holders import EngineRanks
from megatron_rl.weights.shard_plan import ShardPlan

_ROUNDS = 3


class RemoteSync:
    """Sends the policy to all engines; each is driven by the trained rank that started it."""

    def __init__(
        self,
        policy: Policy,
        plan: ShardPlan,
        engines: EngineRanks,
        config: SyncConfig,
        *,
        engine: RemoteEngine | NoEngine,
        number: int | None,
        folder: Path,
    ) -> None:
        """Args:
        policy: what is sent.
        plan: from its ranks to the engines'.
        engines: the ranks of the engines in the plan.
        config: limits and verification.
        engine: that this rank drives, if it does; else it only sends.
        number: of that engine.
        folder: that all ranks and engines share; of this run alone.
        """
        self.policy, self.config, self.engine, self.folder = policy, config, engine, folder
        self._rank = policy.groups.world.rank()
        self._orders = Orders.of(plan, self._rank, {})
        if isinstance(engine, RemoteEngine):
            assert number is not None
            ranks = engines.engine_ranks(number)
            engine.write_orders({rank: Orders.of(plan, rank, engines.expert_rows(rank)) for rank in ranks})
        self._mapped: dict[str, Tensor] = {}
        self.sent_bytes = sum(
            piece.num_bytes for b in self._orders.buckets for pieces in b.outgoing.values() for piece in pieces
        )
        """Bytes that this rank sends."""

    def __call__(self, version: int) -> None:
        """Bring every engine to the policy's present weights; collective.

        Raises:
            TransferError: it failed several times; what each rank saw is in the message.
        """
        for attempt in range(_ROUNDS):
            failures = self._round(version, attempt)
            if not failures:
                return
            self._revive()
        raise TransferError(f"weights of version {version} did not reach the engines: {'; '.join(failures)}")

    def _round(self, version: int, attempt: int) -> list[str]:
        """What went wrong, on any rank."""
        messages = self.folder / f"version_{version}_{attempt}"
        if self._rank == 0:
            messages.mkdir(parents=True)
        dist.barrier(group=self.policy.groups.world)
        limit = self.config.timeout_seconds
        transport = FolderTransport(messages, self._rank, timeout_seconds=limit, mapped=self._mapped)
        failure: str | None = None
        with ThreadPoolExecutor(max_workers=1) as pool:
            loading = pool.submit(self._load, transport, version)
            try:
                check = verified(self.config.verify.name, version)
                Exchange(self._orders, transport).run(self.policy.parameters, None, version=version, verify=check)
            except TransferError as error:
                failure = str(error)
                transport.fail(f"rank {self._rank}: {failure}")
            failure = loading.result() or failure
        everyone: list[str | None] = [None] * dist.get_world_size(self.policy.groups.world)
        dist.all_gather_object(everyone, failure, group=self.policy.groups.world)
        if self._rank == 0:
            shutil.rmtree(messages)
        return sorted({said for said in everyone if said is not None})

    def _load(self, transport: FolderTransport, version: int) -> str | None:
        if isinstance(self.engine, NoEngine):
            return None
        config = self.config
        try:
            self.engine.load(
                transport.folder, version=version, verify=config.verify.name, timeout_seconds=config.timeout_seconds
            )
        except EngineLost as error:
            transport.fail(f"rank {self._rank}: {error}")
            return str(error)
        return None

    def _revive(self) -> None:
        if isinstance(self.engine, RemoteEngine) and not self.engine.answers():
            started = time.monotonic()
            self.engine.restart()
            print(f"megatron-rl: an engine had died; started again in {time.monotonic() - started:.0f} s", flush=True)
