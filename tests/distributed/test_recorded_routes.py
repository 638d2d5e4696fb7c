"""Routes of experts that real engines recorded while they sampled, and what training makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.sampling import Sampling
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.distributed.spawn import run_ranks

# Log-probs of one layout against another's in float32, as tests/distributed/test_layouts.py bounds its losses.
RELATIVE = 1e-5
SAMPLING = Sampling(temperature=1.0, max_response_tokens=9)
LAYOUTS: list[dict[str, Any]] = [
    dict(context_parallel_size=2),
    dict(tensor_model_parallel_size=2, sequence_parallel=True),
    dict(pipeline_model_parallel_size=2),
    dict(expert_model_parallel_size=2),
]
# vLLM's CPU kernel of the rotary embedding is wrong for latent attention's heads; its own fallback is right.
ENGINE_ARGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
}


def make_prompts() -> list[Prompt]:
    """Two that begin alike, as if their cache could be shared, and of lengths that no split divides."""
    ids = torch.randint(3, VOCAB_SIZE, (45,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = (ids[:35], ids[:41], ids[41:])
    return [Prompt(prompt_id=i, token_ids=tuple(p), text="", answer=None, source="") for i, p in enumerate(parts)]


def sampled(folder: Path, engine_args: dict[str, Any], *, weights: Path) -> list[tuple[Prompt, Completion]]:
    """What an engine of all ranks sampled with the weights that it was sent, and its routes."""
    from safetensors.torch import load_file

    engine = RolloutEngine(
        model_path=folder,
        dtype="float32",
        tensor_model_parallel_size=dist.get_world_size(),
        max_model_len=64,
        max_num_seqs=4,  # fewer than there are requests: they come and go
        kv_cache_gigabytes=0.01,
        record_routes=True,
        engine_args=engine_args,
    )
    engine.load_weights(load_file(weights / "model.safetensors").items(), version=1)
    prompts = make_prompts()
    of_prompts = engine.generate(prompts, num_samples=2, sampling=SAMPLING, seeds=[5, 6, 7])
    engine.shutdown()
    return [(prompt, one) for prompt, of_prompt in zip(prompts, of_prompts, strict=True) for one in of_prompt]


def replayed(rank: int, first: Path, folder: Path, engine_args: dict[str, Any]) -> dict[str, Any]:
    """How training's routes compare with the engine's, before and after the routers moved."""
    import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
    from megatron_rl.data.packing import pack
    from megatron_rl.data.samples import TrainingSequence
    from megatron_rl.engine.step import forward_log_probs

    samples = sampled(first, engine_args, weights=folder)
    recorded = [completion.routes for _, completion in samples]
    sequences = [
        TrainingSequence(ids, np.ones(len(ids) - 1, dtype=np.float32))
        for ids in (np.array(prompt.token_ids + completion.token_ids) for prompt, completion in samples)
    ]
    micro_batches = [pack(sequences, micro_batch, pad_to_multiple=4) for micro_batch in ([0, 4, 1], [2, 5], [3])]
    found: dict[str, Any] = {
        "shapes": [routes.shape for routes in recorded],
        "lengths": [sequence.num_positions for sequence in sequences],
    }
    policy = build(folder, {})
    with policy.routing.recording():
        forward_log_probs(policy, micro_batches)
    found["differ_from_own"] = differing(policy.routing.routes(), micro_batches, recorded)
    move_routers(policy)
    with policy.routing.recording():
        free = forward_log_probs(policy, micro_batches)
    found["moved"] = differing(policy.routing.routes(), micro_batches, recorded)
    policy.routing.take(micro_batches, recorded)
    with policy.routing.replaying():
        expected = forward_log_probs(policy, micro_batches)
        chosen = chosen_in_a_pass(policy, micro_batches)
    found["differ_in_replay"] = differing(chosen, micro_batches, recorded)
    found["effect"] = largest(free, expected)
    leave()
    found["errors"] = []
    for layout in LAYOUTS if dist.get_world_size() == 2 else []:
        policy = build(folder, layout)
        move_routers(policy)
        policy.routing.take(micro_batches, recorded)
        with policy.routing.replaying():
            found["errors"].append(largest(forward_log_probs(policy, micro_batches), expected))
        leave()
    return found


def build(folder: Path, layout: dict[str, Any]) -> Any:
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy

    parallel = ParallelConfig(**layout)
    groups = initialize(parallel, seed=1)
    settings = ModelConfig(hf_path=str(folder), params_dtype=Dtype.float32, moe_routing_replay=True)
    return Policy(settings, groups, parallel, use_distributed_optimizer=False)


def leave() -> None:
    from tests.distributed.layout_matrix import leave

    leave()


def move_routers(policy: Any) -> None:
    """Alike at every layout: routers are whole on every rank."""
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            if name.endswith("router.weight"):
                parameter.mul_(1 + 0.5 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)))


def chosen_in_a_pass(policy: Any, micro_batches: Any) -> list[list[torch.Tensor]]:
    """For each micro-batch and layer what its router gave, whatever it was told: [tokens, topk]."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_rl.engine.step import forward_log_probs

    routers = [m for m in policy.models[0].modules() if isinstance(m, TopKRouter)]
    maps: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda module, given, out: maps.append(out[1].clone())) for r in routers]
    forward_log_probs(policy, micro_batches)
    for hook in hooks:
        hook.remove()
    indices = [one.nonzero()[:, 1].view(len(one), -1) for one in maps]
    return [indices[start : start + len(routers)] for start in range(0, len(indices), len(routers))]


def differing(chosen: Any, micro_batches: Any, recorded: Any) -> int:
    """Choices of a token in a layer that are another set of experts than recorded, on one rank without padding."""
    count = 0
    for of_micro_batch, micro_batch in zip(chosen, micro_batches, strict=True):
        expected = torch.cat([torch.from_numpy(recorded[i].astype(np.int64)) for i in micro_batch.sequence_ids])
        for layer, indices in enumerate(of_micro_batch):
            own = indices.long()[: len(expected)].sort(dim=1).values
            count += int((own != expected[:, layer].sort(dim=1).values).any(1).sum())
    return count


def largest(one: Any, other: Any) -> float:
    """Largest difference of two passes' log-probs, over the size of theirs."""
    return max(float((a - b).abs().max() / b.abs().max()) for (a, _), (b, _) in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("family", "num_ranks"), [("qwen3_moe", 2), pytest.param("deepseek_v3", 1, marks=pytest.mark.slow)]
)
def test_the_engines_routes_are_taken(tmp_path: Path, family: str, num_ranks: int) -> None:
    first, folder = (make_checkpoint(tmp_path / f"{seed}", family, seed=seed) for seed in (3, 4))
    num_layers = {"qwen3_moe": 2, "deepseek_v3": 1}[family]  # one of DeepSeek's two is dense
    topk = {"qwen3_moe": 2, "deepseek_v3": 4}[family]
    for found in run_ranks(replayed, num_ranks, first, folder, ENGINE_ARGS[family], timeout_s=300.0):
        assert found["shapes"] == [(length, num_layers, topk) for length in found["lengths"]]
        # Scores of random experts are far apart beside float32's roundings.
        assert found["differ_from_own"] == 0
        assert found["moved"] > 0  # so that the replay has something to do, and is seen in the log-probs
        assert found["effect"] > 100 * RELATIVE
        assert found["differ_in_replay"] == 0
        assert len(found["errors"]) == (len(LAYOUTS) if num_ranks == 2 else 0)
        assert all(error <= RELATIVE for error in found["errors"]), found["errors"]
