"""What ranks of the weight synchronisation's tests do, and what they are compared with: transformers, and numpy.

The engine's parameters are read back before vLLM prepares them for its kernels, after which a CPU's are gone; what it
then computes is compared with transformers, on the same checkpoint.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig, SyncConfig, SyncTransport, SyncVerify
from megatron_rl.data.samples import Prompt
from megatron_rl.parallel.meeting import Meeting
from megatron_rl.placement.layout import Layout
from megatron_rl.rollout.address import Address
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.sampling import Sampling
from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.vllm_shards import vllm_shards

# float32 against transformers, as in test_rollout_parallel.py.
LOG_PROB_TOLERANCE = 5e-5
NUM_TOKENS = 8
# vLLM's CPU kernel of the rotary embedding is wrong for latent attention's heads; its own fallback is right.
_WITHOUT_KERNEL: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
ENGINE_ARGS = dict.fromkeys(("deepseek_v2", "deepseek_v3", "moonlight"), _WITHOUT_KERNEL)
# Megatron-Core wants sequence parallelism of models with experts at tensor parallel; the others take it as well.
_TENSOR = dict(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": _TENSOR,
    "pp2": dict(pipeline_model_parallel_size=2),
    "dp2": {},
    "ep2": dict(expert_model_parallel_size=2),
    "tp2_ep2": dict(**_TENSOR, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
    "tp2_pp2": dict(**_TENSOR, pipeline_model_parallel_size=2),
}


def parallel_of(layout: str, family: str) -> ParallelConfig:
    """The layout; Megatron-Core does not split experts with biases over tensor-parallel ranks."""
    whole_experts = {"expert_tensor_parallel_size": 1} if family == "gpt_oss" and "tp2" in layout else {}
    return ParallelConfig(**(LAYOUTS[layout] | whole_experts))


SHAPES: dict[str, dict[str, Any]] = {name: {} for name in FAMILIES} | {"llama_one_group": {"num_key_value_heads": 1}}


def make_prompts() -> list[Prompt]:
    ids = torch.randint(3, VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()
    return [Prompt(prompt_id=i, token_ids=tuple(ids[i]), text="", answer=None, source="") for i in range(2)]


# Small enough that the embedding, too, travels in several buckets.
_SYNCS = itertools.count()
_SYNC = SyncConfig(verify=SyncVerify.full, verify_tolerance=1e-4, bucket_megabytes=0.05, timeout_seconds=60)


def sync_in_rank(
    rank: int, layout: str, engine_sizes: list[int], folders: dict[str, list[Path]]
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """For each family and size of the engines: start from the first checkpoint, sync the others one after another."""
    import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
    from megatron_rl.engine.initialize import initialize

    parallel = parallel_of(layout, next(iter(folders)))
    groups = initialize(parallel, seed=1)
    results = {}
    for family, (first, *others) in folders.items():
        policy = _policy(first, groups, parallel)
        for size in engine_sizes:
            engine = RolloutEngine(
                model_path=first,
                dtype="float32",
                tensor_model_parallel_size=size,
                max_model_len=64,
                max_num_seqs=4,
                kv_cache_gigabytes=0.01,
                engine_args=ENGINE_ARGS.get(family, {}),
            )
            sync = _weight_sync(policy, engine, _placed(groups, engine_size=size), _SYNC)
            results[family, size] = [
                _synced(policy, engine, sync, folder, version) for version, folder in enumerate(others, 1)
            ]
            engine.shutdown()
    return results


@dataclass(frozen=True)
class Server:
    """A server that the test has started, and will end."""

    address: Address


@dataclass(frozen=True)
class Apart:
    """Engines in processes of their own, of equal size, and the transport to them."""

    addresses: list[Address]
    size: int
    transport: SyncTransport
    folder: Path


def sync_apart_in_rank(
    rank: int, layout: str, engines: list[Apart], checkpoints: "Checkpoints"
) -> list[list[dict[str, Any]]]:
    """For each set of engines: sync the checkpoints one after another; what the engine of this rank does, if it has."""
    import megatron_rl.device  # noqa: F401
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.rollout.remote import NoEngine, RemoteEngine

    parallel = parallel_of(layout, checkpoints.family)
    groups = initialize(parallel, seed=1)
    results = []
    for apart in engines:
        policy = _policy(checkpoints.first, groups, parallel)
        engine: Any = NoEngine(apart.folder)
        if rank < len(apart.addresses):
            server: Any = Server(apart.addresses[rank])
            engine = RemoteEngine(server, folder=apart.folder, decode=str, max_model_len=64)
        placed = _placed(groups, engine_size=apart.size, remote_engines=len(apart.addresses))
        sync = _weight_sync(policy, engine, placed, dataclasses.replace(_SYNC, transport=apart.transport))
        results.append(
            [_synced(policy, engine, sync, folder, version) for version, folder in enumerate(checkpoints.others, 1)]
        )
    return results


def _policy(first: Path, groups: Any, parallel: ParallelConfig) -> Any:
    from megatron_rl.engine.policy import Policy

    return Policy(ModelConfig(hf_path=str(first), params_dtype=Dtype.float32), groups, parallel)


def _weight_sync(policy: Any, engine: Any, placed: Layout, config: SyncConfig) -> Any:
    from megatron_rl.sync.weight_sync import WeightSync

    pad_to_multiple = policy.groups.tp.size()
    meeting = Meeting.of_world(f"sync {next(_SYNCS)}", limit_seconds=60.0)
    return WeightSync(
        policy,
        engine,
        placed,
        make_prompts(),
        config,
        quantization=None,
        pad_to_multiple=pad_to_multiple,
        meeting=meeting,
    )


def _placed(groups: Any, **engines: Any) -> Layout:
    sizes = dict(pipeline_model_parallel_size=groups.pp.size(), data_parallel_size=groups.dp.size())
    return Layout(groups.tp.size(), **sizes, **engines)


def _synced(policy: Any, engine: Any, sync: Any, folder: Path, version: int) -> dict[str, Any]:
    policy.load_hf_weights(folder)
    held: dict[str, np.ndarray] = {}
    metrics = sync(version, lambda name, values: held.update({name: values.numpy().copy()}))
    if not hasattr(engine, "log_probs"):  # this rank has none
        return {}
    prompts = make_prompts()
    greedy = Sampling(temperature=0.0, max_response_tokens=NUM_TOKENS)
    groups = engine.generate(prompts, num_samples=1, sampling=greedy, seeds=[0, 0])
    return {
        "held": held,
        "metrics": metrics,
        "completions": [group[0] for group in groups],
        "log_probs": engine.log_probs([prompt.token_ids for prompt in prompts]),
    }


@dataclass(frozen=True)
class Expected:
    """What transformers makes of a checkpoint."""

    completions: list[tuple[int, ...]]
    log_probs: list[torch.Tensor]


@torch.no_grad()
def by_transformers(folder: Path) -> Expected:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    completions, log_probs = [], []
    for prompt in make_prompts():
        ids = list(prompt.token_ids)
        scored = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        log_probs.append(scored.gather(1, torch.tensor(ids)[1:, None])[:, 0])
        while len(ids) < len(prompt.token_ids) + NUM_TOKENS and model.config.eos_token_id not in ids:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        completions.append(tuple(ids[len(prompt.token_ids) :]))
    return Expected(completions, log_probs)


@dataclass(frozen=True)
class Checkpoints:
    """One of a family with random weights to start from, and two to synchronise."""

    family: str
    first: Path
    others: list[Path]

    @classmethod
    def make(cls, root: Path, family: str) -> "Checkpoints":
        kind = family.removesuffix("_one_group")
        first, *others = (
            make_checkpoint(root / f"{family}_{seed}", kind, seed, **SHAPES[family]) for seed in (1, 2, 3)
        )
        return cls(family, first, others)

    def expected_shards(self, folder: Path, size: int) -> list[dict[str, np.ndarray]]:
        """Parameters of each rank of an engine of that size, as vLLM's loaders would fill them."""
        whole = {name: x.numpy() for name, x in load_file(folder / "model.safetensors").items()}
        heads = json.loads((folder / "config.json").read_text())["num_key_value_heads"]
        return [vllm_shards(whole, num_key_value_heads=heads, tp=size, rank=rank) for rank in range(size)]


def check_outputs(result: dict[str, Any], expected: Expected, version: int) -> None:
    """Greedy tokens and log-probs of an engine are transformers'."""
    assert [c.token_ids for c in result["completions"]] == expected.completions
    assert {c.weight_version for c in result["completions"]} == {version}
    for ours, theirs in zip(result["log_probs"], expected.log_probs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0, atol=LOG_PROB_TOLERANCE)


def differences(held: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    for name in sorted(held.keys() | expected.keys()):
        if name not in held or name not in expected:
            yield name, "only in the engine" if name in held else "not in the engine"
        elif held[name].tobytes() != np.ascontiguousarray(expected[name]).tobytes():
            yield name, "other values"
