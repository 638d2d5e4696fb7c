"""Rollout engines in a world of two ranks: one engine of each rank, and one engine of both."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.sampling import RolloutError, Sampling
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.distributed.spawn import run_ranks

# float32 against transformers, as in tests/e2e/test_rollout_engine.py; here sums are also split over ranks.
LOG_PROB_TOLERANCE = 5e-5
SAMPLING = Sampling(temperature=0.7, max_response_tokens=10)
NUM_SAMPLES = 2


def make_prompts() -> list[Prompt]:
    ids = torch.randint(3, VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(0))
    return [
        Prompt(prompt_id=i, token_ids=tuple(ids[i, : 20 + 10 * i].tolist()), text="", answer=None, source="")
        for i in range(3)
    ]


def generate(engine: RolloutEngine, which: list[int]) -> list[list[Completion]]:
    prompts = make_prompts()
    seeds = [100 + i for i in which]
    return engine.generate([prompts[i] for i in which], num_samples=NUM_SAMPLES, sampling=SAMPLING, seeds=seeds)


def engines_of_one_rank_then_of_two(rank: int, first: Path, second: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model_path": first,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 16,
        "kv_cache_gigabytes": 0.01,
    }
    try:
        RolloutEngine(tensor_model_parallel_size=3, **arguments)
    except RolloutError as error:
        refusal = str(error)
    engine = RolloutEngine(tensor_model_parallel_size=1, **arguments)
    # Rank 0 has two prompts, rank 1 has one, and then one more: an engine that waited for the other's would hang.
    own = generate(engine, [0, 1] if rank == 0 else [2])
    if rank == 1:
        generate(engine, [0])
    engine.load_weights(load_file(second / "model.safetensors").items(), version=1 + rank)
    own_after = generate(engine, [0, 1] if rank == 0 else [2])
    engine.shutdown()

    engine = RolloutEngine(tensor_model_parallel_size=2, **arguments)
    both = generate(engine, [0, 1, 2])
    shared_memory = [line for line in Path("/proc/self/maps").read_text().splitlines() if "cpushm" in line]
    log_probs = engine.log_probs([prompt.token_ids for prompt in make_prompts()])
    engine.load_weights(load_file(second / "model.safetensors").items(), version=5)
    both_after = generate(engine, [0, 1, 2])
    log_probs_after = engine.log_probs([prompt.token_ids for prompt in make_prompts()])
    engine.shutdown()
    # The world has outlived two engines.
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    return {
        "refusal": refusal,
        "own": own,
        "own_after": own_after,
        "both": both,
        "both_after": both_after,
        "log_probs": log_probs,
        "log_probs_after": log_probs_after,
        "shared_memory": shared_memory,
        "total": total.item(),
    }


def token_ids(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def assert_log_probs_are_transformers(folder: Path, log_probs: list[list[float]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for prompt, actual in zip(make_prompts(), log_probs, strict=True):
        ids = torch.tensor(prompt.token_ids)
        with torch.no_grad():
            expected = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(actual), expected, rtol=0, atol=LOG_PROB_TOLERANCE)


def test_engines_of_one_rank_and_of_two(tmp_path: Path) -> None:
    # Tied weights and an odd vocabulary: both ranks hold a padded part of one matrix that is read and written.
    first, second = (make_checkpoint(tmp_path / str(seed), "llama", seed) for seed in (1, 2))
    ranks = run_ranks(engines_of_one_rank_then_of_two, 2, first, second)
    for rank, result in enumerate(ranks):
        assert result["refusal"] == "rollout.tensor_model_parallel_size is 3; it must divide the 2 ranks"
        assert result["shared_memory"] == []
        assert result["total"] == 3
        assert {c.weight_version for group in result["own_after"] for c in group} == {1 + rank}
        assert {c.weight_version for group in result["both_after"] for c in group} == {5}
    # Both ranks of the engine hold the same result, to the bit, and it is that of the engines of one rank.
    for name in ("both", "both_after", "log_probs", "log_probs_after"):
        assert ranks[0][name] == ranks[1][name]
    for name in ("", "_after"):
        separate = ranks[0][f"own{name}"] + ranks[1][f"own{name}"]
        assert token_ids(ranks[0][f"both{name}"]) == token_ids(separate)
        for ours, theirs in zip(ranks[0][f"both{name}"], separate, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(
                    torch.tensor(one.log_probs), torch.tensor(other.log_probs), rtol=0, atol=LOG_PROB_TOLERANCE
                )
    assert token_ids(ranks[0]["both"]) != token_ids(ranks[0]["both_after"])
    assert_log_probs_are_transformers(first, ranks[0]["log_probs"])
    assert_log_probs_are_transformers(second, ranks[0]["log_probs_after"])
