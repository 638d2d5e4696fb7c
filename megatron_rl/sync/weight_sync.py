"""Weight sync: the policy's weights to every engine, under a version, and on demand the proof that they arrived.

`WeightSync` plans the copies once and carries them out for each version: inside the ranks for colocated engines, by
`RemoteSync` for engines in processes of their own, as whole quantised tensors for engines with `rollout.quantization`.

`sync.verify` takes checksums of each parameter, where it is sent and again in the engine's memory before vLLM prepares
it for its kernels, which see every bit; and log-probs of probe prompts, which see what the engine then computes.
"""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor

from megatron_rl.config.schema import QuantizedFormat, SyncConfig, SyncVerify
from megatron_rl.data.packing import pack, unpack
from megatron_rl.data.samples import Prompt, TrainingSequence
from megatron_rl.device import this_device
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_log_probs
from megatron_rl.parallel.meeting import Meeting
from megatron_rl.placement.layout import Layout
from megatron_rl.rollout.address import EngineLost
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.remote import NoEngine, RemoteEngine
from megatron_rl.sync.engines import Engine
from megatron_rl.sync.remote_sync import RemoteSync
from megatron_rl.weights.files.local_shards import trained_ranks
from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.plan.ranks import EngineRanks
from megatron_rl.weights.plan.shard_plan import plan_sync
from megatron_rl.weights.quantized.formats import quantized_tensors
from megatron_rl.weights.quantized.fp8_parameters import dequantized
from megatron_rl.weights.transport.exchange import Exchange, Loader, OnFilled, verified
from megatron_rl.weights.transport.process_group import ProcessGroupTransport

NUM_PROBES = 4


class SyncMismatchError(RuntimeError):
    """The engine does not compute with the weights that it was sent."""


class WeightSync:
    """Sends the policy to this rank's engine, or to those in other processes."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        layout: Layout,
        prompts: Sequence[Prompt],
        config: SyncConfig,
        *,
        quantization: QuantizedFormat | None,
        pad_to_multiple: int,
        meeting: Meeting,
    ) -> None:
        """Plan the copies; collective.

        Args:
            policy: what is sent.
            engine: this rank's, or its client of one in other processes.
            layout: of the training ranks and the engines.
            prompts: the first few serve as probes of `sync.verify`.
            config: transport, buckets, verification, limits.
            quantization: the format that the engine rounds weights to, if it does.
            pad_to_multiple: micro-batches are this long or a multiple of it.
            meeting: where ranks wait for those that start an engine again.
        """
        self.policy, self.engine, self.config = policy, engine, config
        self._quantization, self._pad_to_multiple = quantization, pad_to_multiple
        # A log-prob needs a token before it; doubled, a prompt of one token has one.
        probes = [prompt.token_ids for prompt in prompts[:NUM_PROBES]]
        self.probes = [ids if len(ids) > 1 else ids * 2 for ids in probes]
        self._bucket_bytes = int(self.config.bucket_megabytes * 2**20)
        self.version = 0
        """The latest that was sent."""
        self._remote: RemoteSync | None = None
        if quantization is not None:
            return  # vLLM's own loader places quantised tensors, which it wants whole
        trained = trained_ranks(policy.parameters, policy.groups)
        rank, remote = policy.groups.world.rank(), layout.remote_engines is not None
        engines = EngineRanks(
            num_engines=layout.num_engines,
            tensor=layout.engine_size,
            stage_of_layer=(0,) * len(trained.stage_of_layer),
            first_rank=trained.world_size if remote else 0,
            num_experts=max((tensor_map.num_experts for tensor_map in policy.maps), default=0),
        )
        dtype = str(policy.dtype).removeprefix("torch.")
        plan = plan_sync(policy.hf, policy.maps, trained, engines, dtype=dtype, bucket_bytes=self._bucket_bytes)
        if isinstance(engine, RemoteEngine | NoEngine):
            number = layout.engine(rank)
            self._remote = RemoteSync(policy, plan, engines, self.config, engine=engine, number=number, meeting=meeting)
            return
        timeout = timedelta(seconds=self.config.timeout_seconds)
        self._transport = ProcessGroupTransport(policy.groups.world, timeout=timeout, device=this_device())
        self._rank_plan = RankPlan.of(plan, rank, engines.expert_rows(rank))
        self._exchange = Exchange(self._rank_plan)

    def __call__(self, version: int, on_filled: OnFilled | None = None) -> dict[str, float]:
        """Load the policy's present weights into the engine under `version`; collective. `on_filled`: see the engine.

        Raises:
            TransferError: weights did not arrive as they were sent.
            SyncMismatchError: sync.verify found other log-probs in the engine than in the policy.
        """
        start = time.perf_counter()
        self.version = version
        if self._remote is not None:
            self._remote(version)
            num_bytes = self._remote.sent_bytes
        elif (format := self._quantization) is not None:
            num_bytes = self._send_quantized(format, version)
        else:
            num_bytes = self._send_shards(version, on_filled)
        seconds = time.perf_counter() - start
        if self.config.verify is not SyncVerify.off:
            self._probe(version)
        return {"sync/version": version, "sync/bytes": num_bytes, "sync/seconds": seconds}

    def _send_shards(self, version: int, on_filled: OnFilled | None) -> int:
        def feed(loader: Loader) -> None:
            verify = verified(self.config.verify.name, version)
            policy = self.policy
            values = {name: dequantized(parameter, policy.dtype) for name, parameter in policy.parameters.items()}
            self._exchange.run(values, loader, self._transport, version=version, verify=verify)

        cast(RolloutEngine, self.engine).load_shards(self._rank_plan.shard, feed, version=version, on_filled=on_filled)
        return self._rank_plan.received_bytes

    def _send_quantized(self, format: QuantizedFormat, version: int) -> int:
        policy, num_bytes = self.policy, 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes
            tensors = policy.hf_tensors(bucket_bytes=self._bucket_bytes)
            for name, tensor in quantized_tensors(format, tensors, policy.maps):
                num_bytes += tensor.numel() * tensor.element_size()
                yield name, tensor

        cast(RolloutEngine, self.engine).load_weights(counted(), version=version)
        return num_bytes

    def _probe(self, version: int) -> None:
        sequences = [
            TrainingSequence(torch.tensor(ids).numpy(), torch.ones(len(ids) - 1).numpy()) for ids in self.probes
        ]
        # The same micro-batch on every data-parallel rank: each verifies its own engine.
        micro_batch = pack(sequences, range(len(sequences)), pad_to_multiple=self._pad_to_multiple)
        ((log_probs, _),) = forward_log_probs(self.policy, [micro_batch])
        if isinstance(self.engine, NoEngine):
            return
        try:
            of_engine = self.engine.log_probs(self.probes)
        except EngineLost:
            return  # it has died since; the next call finds that, and weights are sent and probed again
        # Joined before the maximum is taken: torch's is nan if one is, Python's depends on the order.
        ours = torch.cat(unpack(log_probs, micro_batch))
        theirs = torch.cat([torch.tensor(of_probe) for of_probe in of_engine])
        difference = float((ours - theirs).abs().max())
        if not difference <= self.config.verify_tolerance:
            raise SyncMismatchError(
                f"weights of version {version}: the engine's log-probs are off the policy's by {difference:.3g} nats, "
                f"sync.verify_tolerance is {self.config.verify_tolerance:g}"
            )
