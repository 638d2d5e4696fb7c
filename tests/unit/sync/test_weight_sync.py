"""Weight sync with a real policy and a stand-in for the engine, whose log-probs the test decides.

That a real engine computes with what it was sent is shown where engines run; here is what happens if it does not.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.config.schema import SyncConfig, SyncVerify
from megatron_rl.data.packing import pack, unpack
from megatron_rl.data.samples import Prompt, TrainingSequence
from megatron_rl.placement.layout import Layout
from megatron_rl.weights.plan.rank_plan import EngineShard
from megatron_rl.weights.plan.shard_plan import Slice
from megatron_rl.weights.transport.exchange import Loader
from megatron_rl.weights.transport.messages import add, checksum
from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks

# The third has one token, which no log-prob can be had of, and the last is beyond the four probes.
PROMPTS = [Prompt(i, ids, "", None, "") for i, ids in enumerate([(5, 6, 7), (8, 9), (10,), (11, 12), (13, 14)])]
PROBES = [(5, 6, 7), (8, 9), (10, 10), (11, 12)]
TOLERANCE = 1e-3


class Engine:
    """Takes weights, and answers with the given log-probs."""

    def __init__(self, answers: Sequence[Sequence[float]]) -> None:
        self.answers = answers
        self.loaded: dict[str, Tensor] = {}
        self.checksums: dict[str, int] = {}
        self.version = 0
        self.probed: list[tuple[int, ...]] = []

    def load_shards(self, shard: EngineShard, feed: Callable[[Loader], None], *, version: int, on_filled: None) -> None:
        self.loaded = {name: torch.full(shape, torch.nan) for name, shape in shard.shapes.items()}
        for name, dim, start, size in shard.zeros:
            self.loaded[name].narrow(dim, start, size).zero_()
        feed(self)
        self.version = version

    def write(self, piece: Slice, values: Tensor, expected: int | None) -> None:
        self.loaded[piece.target][piece.block.target_index] = values
        if expected is not None:
            self.checksums[piece.target] = add(self.checksums.get(piece.target, 0), expected)

    def end_bucket(self) -> None:
        pass

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        self.probed = [tuple(sequence) for sequence in sequences]
        return self.answers


def sync_in_rank(rank: int, checkpoint: Path) -> dict[str, Any]:
    """Sync a policy with engines that answer rightly and wrongly; what happened, by case."""
    from megatron_rl.engine.step import forward_log_probs
    from megatron_rl.sync.weight_sync import SyncMismatchError, WeightSync
    from tests.distributed.training_ranks import start_policy

    policy = start_policy(checkpoint, "tp1")
    sequences = [TrainingSequence(np.array(p), np.ones(len(p) - 1, dtype=np.float32)) for p in PROBES]
    micro_batch = pack(sequences, range(len(PROBES)), pad_to_multiple=1)
    ((log_probs, _),) = forward_log_probs(policy, [micro_batch])
    right = [part.tolist() for part in unpack(log_probs, micro_batch)]

    def changed(probe: int, by: float) -> list[list[float]]:
        return [[*values[:-1], values[-1] + by] if i == probe else values for i, values in enumerate(right)]

    def sync(answers: list[list[float]], *, verify: SyncVerify = SyncVerify.full) -> dict[str, Any]:
        config = SyncConfig(verify=verify, verify_tolerance=TOLERANCE, bucket_megabytes=0.1)
        engine = Engine(answers)
        weight_sync = WeightSync(
            policy,
            cast(Any, engine),
            Layout(1, 1, 1),
            PROMPTS,
            config,
            quantization=None,
            pad_to_multiple=1,
            meeting=cast(Any, None),  # only engines apart are waited for
        )
        try:
            metrics = weight_sync(version=3)
        except SyncMismatchError as error:
            return {"error": str(error)}
        return {"metrics": metrics, "version": engine.version, "loaded": engine.loaded, "probed": engine.probed} | {
            "checksums": engine.checksums
        }

    return {
        "right": sync(right),
        "near": sync(changed(1, 0.9 * TOLERANCE)),
        "far": sync(changed(1, -1.5 * TOLERANCE)),
        "nan": sync(changed(3, float("nan"))),
        "unverified": sync(changed(1, 7.0), verify=SyncVerify.off),
        "sampled": sync(right, verify=SyncVerify.sample),
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3", seed=5)


@pytest.fixture(scope="module")
def outcome(checkpoint: Path) -> dict[str, Any]:
    return run_ranks(sync_in_rank, 1, checkpoint)[0]


def test_the_engine_gets_the_policy_under_its_version(outcome: dict[str, Any], checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    loaded = outcome["right"]["loaded"]
    # vLLM's names and shapes: three projections in one, two in another, 259 rows of the vocabulary padded to 320.
    expected = {name: tensor for name, tensor in tensors.items() if "_proj" not in name or "o_proj" in name}
    expected |= {name: tensor for name, tensor in tensors.items() if "down_proj" in name}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for owner, fused, parts in ((attention, "qkv_proj", "qkv"), (mlp, "gate_up_proj", ("gate", "up"))):
            stacked = torch.cat([tensors[f"{owner}{part}_proj.weight"] for part in parts])
            expected[f"{owner}{fused}.weight"] = stacked
    embedding = torch.zeros(320, 96)
    embedding[:259] = tensors["model.embed_tokens.weight"]
    expected["model.embed_tokens.weight"] = embedding
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert outcome["right"]["version"] == 3
    metrics = outcome["right"]["metrics"]
    assert metrics["sync/version"] == 3
    assert metrics["sync/bytes"] == 4 * sum(tensor.numel() for tensor in tensors.values())
    assert metrics["sync/seconds"] > 0


def test_checksums_of_what_is_sent_are_those_of_what_arrived(outcome: dict[str, Any]) -> None:
    loaded = outcome["right"]["loaded"]
    assert outcome["right"]["checksums"] == {name: checksum(tensor) for name, tensor in loaded.items()}
    sampled = outcome["sampled"]["checksums"]
    assert sampled.items() <= outcome["right"]["checksums"].items()
    assert 0 < len(sampled) < len(loaded)
    assert outcome["unverified"]["checksums"] == {}


def test_the_first_prompts_are_the_probes(outcome: dict[str, Any]) -> None:
    assert outcome["right"]["probed"] == PROBES


def test_rounding_is_accepted(outcome: dict[str, Any]) -> None:
    assert "error" not in outcome["near"]


def test_other_log_probs_stop_the_run(outcome: dict[str, Any]) -> None:
    assert outcome["far"] == {
        "error": "weights of version 3: the engine's log-probs are off the policy's by 0.0015 nats, "
        "sync.verify_tolerance is 0.001"
    }


def test_a_nan_of_the_engine_stops_the_run(outcome: dict[str, Any]) -> None:
    """Also behind probes that agree."""
    assert "are off the policy's by nan nats" in outcome["nan"]["error"]


def test_without_verify_nobody_asks(outcome: dict[str, Any]) -> None:
    assert outcome["unverified"]["probed"] == []
