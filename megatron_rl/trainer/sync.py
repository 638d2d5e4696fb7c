"""Policy to engines: send the weights with their version, and on demand prove that they arrived."""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_rl.config.schema import SyncConfig
from megatron_rl.data.packing import pack, unpack
from megatron_rl.data.samples import Prompt, TrainingSequence
from megatron_rl.engine.step import forward_log_probs
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.trainer.training import Training
from megatron_rl.weights.quantization import quantized_tensors

NUM_PROBES = 4


class SyncMismatchError(RuntimeError):
    """The engine does not compute with the weights that it was sent."""


class WeightSync:
    """Sends the policy to this rank's engine."""

    def __init__(self, training: Training, engine: RolloutEngine, prompts: Sequence[Prompt]) -> None:
        """`prompts`: the first few serve as probes of `sync.verify`."""
        self.training, self.engine = training, engine
        self.config: SyncConfig = training.config.sync
        # A log-prob needs a token before it; doubled, a prompt of one token has one.
        probes = [prompt.token_ids for prompt in prompts[:NUM_PROBES]]
        self.probes = [ids if len(ids) > 1 else ids * 2 for ids in probes]

    def __call__(self, version: int) -> dict[str, float]:
        """Load the policy's present weights into the engine under `version`; collective.

        Raises:
            SyncMismatchError: sync.verify found other log-probs in the engine than in the policy.
        """
        start = time.perf_counter()
        num_bytes = 0

        def counted(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes
            for name, tensor in tensors:
                num_bytes += tensor.numel() * tensor.element_size()
                yield name, tensor

        bucket_bytes = int(self.config.bucket_megabytes * 2**20)
        policy, format = self.training.policy, self.training.config.rollout.quantization
        tensors = policy.hf_tensors(bucket_bytes=bucket_bytes)
        if format is not None:
            tensors = quantized_tensors(format, tensors, policy.maps)
        self.engine.load_weights(counted(tensors), version=version)
        seconds = time.perf_counter() - start
        if self.config.verify:
            self._verify(version)
        return {"sync/version": version, "sync/bytes": num_bytes, "sync/seconds": seconds}

    def _verify(self, version: int) -> None:
        sequences = [
            TrainingSequence(torch.tensor(ids).numpy(), torch.ones(len(ids) - 1).numpy()) for ids in self.probes
        ]
        # The same row on every data-parallel rank: each verifies its own engine.
        row = pack(sequences, range(len(sequences)), pad_to_multiple=self.training.pad_to_multiple)
        ((log_probs, _),) = forward_log_probs(self.training.policy, [row])
        of_engine = self.engine.log_probs(self.probes)
        # Joined before the maximum is taken: torch's is nan if one is, Python's depends on the order.
        ours = torch.cat(unpack(log_probs, row))
        theirs = torch.cat([torch.tensor(of_probe) for of_probe in of_engine])
        difference = float((ours - theirs).abs().max())
        if not difference <= self.config.verify_tolerance:
            raise SyncMismatchError(
                f"weights of version {version}: the engine's log-probs are off the policy's by {difference:.3g} nats, "
                f"sync.verify_tolerance is {self.config.verify_tolerance:g}"
            )
