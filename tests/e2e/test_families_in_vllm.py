"""Every family, trained for a step over two ranks and exported, is the same model in vLLM: the same greedy tokens.

That is vLLM's CPU build. Its kernel of the rotary embedding is wrong for the heads of latent attention, its own
fallback is right.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.data.samples import Prompt
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.sampling import Sampling
from tests.checkpoints import EOS_TOKEN_ID, FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.distributed.spawn import run_ranks

# float32 on all sides, which round differently; 2e-5 was measured for log-probs of the order of 10 nats. A tensor in
# the wrong place moves them by more than 0.1.
TOLERANCE = 1e-4
NUM_TOKENS = 12
_EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
_TP2_EP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, **_EP2}
_TP2 = {"tensor_model_parallel_size": 2}
LAYOUT = dict.fromkeys(FAMILIES, _TP2) | {
    "gpt_oss": _EP2,
    "mixtral": _EP2,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "moonlight", "qwen3_moe"), _TP2_EP2),
}
WITHOUT_KERNEL = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
ENGINE_ARGS: dict[str, Any] = dict.fromkeys(("deepseek_v2", "deepseek_v3", "moonlight"), WITHOUT_KERNEL)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (3, 20, 40)]


def train_and_export(rank: int, source: Path, layout: dict[str, Any], output: Path) -> list[np.ndarray]:
    """A step of fine-tuning and an export; returns the policy's log-probs of the prompts."""
    from megatron_rl.checkpoint.hf_export import export_hf
    from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy
    from tests.distributed.test_conversion import policy_log_probs, train_a_step

    parallel = ParallelConfig(**layout)
    groups = initialize(parallel, seed=1)
    policy = Policy(ModelConfig(hf_path=str(source), params_dtype=Dtype.float32), groups, parallel)
    train_a_step(policy)
    export_hf(policy, output)
    return policy_log_probs(policy, make_prompts())


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """transformers' completion, and the log-probs of its tokens."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NUM_TOKENS and EOS_TOKEN_ID not in ids[len(prompt) :]:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :], log_probs(model, ids)[len(prompt) - 1 :]


@torch.no_grad()
def log_probs(model: Any, ids: list[int]) -> np.ndarray:
    """[L - 1]: of every token but the first."""
    scored = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return np.asarray(scored.gather(1, torch.tensor(ids)[1:, None])[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_greedy_tokens(tmp_path: Path, family: str) -> None:
    source = make_checkpoint(tmp_path / "source", family, seed=8)
    exported = tmp_path / "exported"
    of_ranks = run_ranks(train_and_export, 2, source, LAYOUT[family], exported, timeout_s=300.0)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [greedy(model, prompt) for prompt in make_prompts()]
    engine = RolloutEngine(
        model_path=exported,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_gigabytes=0.02,
        engine_args=ENGINE_ARGS.get(family, {}),
    )
    try:
        scored = engine.log_probs(make_prompts())
        prompts = [
            Prompt(prompt_id=i, token_ids=tuple(ids), text="", answer=None, source="")
            for i, ids in enumerate(make_prompts())
        ]
        sampling = Sampling(temperature=0.0, max_response_tokens=NUM_TOKENS)
        generated = engine.generate(prompts, num_samples=1, sampling=sampling, seeds=[0] * len(prompts))
    finally:
        engine.shutdown()
    for i, ids in enumerate(make_prompts()):
        theirs = log_probs(model, ids)
        for ours in (scored[i], *(of_rank[i] for of_rank in of_ranks)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
        # The step moved them by far more than the tolerance: it is the trained policy that was compared.
        assert np.abs(log_probs(before, ids) - theirs).max() > 0.05
        response, of_response = expected[i]
        assert list(generated[i][0].token_ids) == response
        np.testing.assert_allclose(generated[i][0].log_probs, of_response, rtol=0, atol=TOLERANCE)
