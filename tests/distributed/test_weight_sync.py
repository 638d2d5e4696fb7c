"""Real policies into real engines at several layouts, twice with other weights: bit for bit, and as transformers do.

The engine's parameters are read back before vLLM prepares them for its kernels, after which a CPU's are gone; what it
then computes is compared with transformers, on the same checkpoint.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.config.schema import Config, Dtype, ModelConfig, ParallelConfig, SyncConfig, SyncVerify
from megatron_rl.data.samples import Prompt
from megatron_rl.placement.layout import Layout
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.sampling import Sampling
from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.distributed.spawn import run_ranks
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
SHAPES: dict[str, dict[str, Any]] = {name: {} for name in FAMILIES} | {"llama_one_group": {"num_key_value_heads": 1}}


def make_prompts() -> list[Prompt]:
    ids = torch.randint(3, VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()
    return [Prompt(prompt_id=i, token_ids=tuple(ids[i]), text="", answer=None, source="") for i in range(2)]


def sync_in_rank(
    rank: int, layout: str, engine_sizes: list[int], folders: dict[str, list[Path]]
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """For each family and size of the engines: start from the first checkpoint, sync the others one after another."""
    import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy
    from megatron_rl.trainer.sync import WeightSync

    parallel = ParallelConfig(**LAYOUTS[layout])
    groups = initialize(parallel, seed=1)
    sizes = dict(pipeline_model_parallel_size=groups.pp.size(), data_parallel_size=groups.dp.size())
    results = {}
    # Small enough that the embedding, too, travels in several buckets.
    sync_config = SyncConfig(verify=SyncVerify.full, bucket_megabytes=0.05, timeout_seconds=60)
    for family, (first, *others) in folders.items():
        policy = Policy(ModelConfig(hf_path=str(first), params_dtype=Dtype.float32), groups, parallel)
        training = cast(
            Any, SimpleNamespace(config=Config(sync=sync_config), policy=policy, pad_to_multiple=groups.tp.size())
        )
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
            placed = Layout(groups.tp.size(), engine_size=size, **sizes)
            sync = WeightSync(training, engine, placed, make_prompts())
            results[family, size] = [
                _synced(policy, engine, sync, folder, version) for version, folder in enumerate(others, 1)
            ]
            engine.shutdown()
    return results


def _synced(policy: Any, engine: RolloutEngine, sync: Any, folder: Path, version: int) -> dict[str, Any]:
    policy.load_hf_weights(folder)
    held: dict[str, np.ndarray] = {}
    metrics = sync(version, lambda name, values: held.update({name: values.numpy().copy()}))
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


def check(layout: str, num_ranks: int, engine_sizes: list[int], families: list[str], root: Path) -> None:
    folders = {
        family: [
            make_checkpoint(root / f"{family}_{seed}", family.removesuffix("_one_group"), seed, **SHAPES[family])
            for seed in (1, 2, 3)
        ]
        for family in families
    }
    ranks = run_ranks(sync_in_rank, num_ranks, layout, engine_sizes, folders, timeout_s=300)
    for family, (_, *others) in folders.items():
        for version, folder in enumerate(others, 1):
            expected = by_transformers(folder)
            whole = {name: x.numpy() for name, x in load_file(folder / "model.safetensors").items()}
            heads = json.loads((folder / "config.json").read_text())["num_key_value_heads"]
            for size in engine_sizes:
                for rank, results in enumerate(ranks):
                    result = results[family, size][version - 1]
                    shards = vllm_shards(whole, num_key_value_heads=heads, tp=size, rank=rank % size)
                    assert dict(differences(result["held"], shards)) == {}
                    assert result["metrics"]["sync/bytes"] == 4 * sum(
                        x.size if "embed_tokens" not in name and "lm_head" not in name else np.count_nonzero(x)
                        for name, x in shards.items()
                    )
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


def test_an_engine_of_two_ranks_holds_what_two_pipeline_stages_hold(tmp_path: Path) -> None:
    check("pp2", 2, [2], ["llama_one_group"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "num_ranks", "engine_sizes"), [("tp2", 2, [1, 2]), ("pp2", 2, [1, 2]), ("dp2", 2, [1, 2])]
)
def test_every_family_at_every_layout(layout: str, num_ranks: int, engine_sizes: list[int], tmp_path: Path) -> None:
    check(layout, num_ranks, engine_sizes, list(SHAPES), tmp_path)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    check("tp2_pp2", 4, [1, 2, 4], ["llama", "qwen3_untied"], tmp_path)
