"""A trained policy, exported at tensor parallel 2, is the same model in transformers and in vLLM."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.data.samples import Prompt
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.sampling import Sampling
from tests.checkpoints import EOS_TOKEN_ID, VOCAB_SIZE, make_checkpoint
from tests.distributed.spawn import run_ranks

# float32 on all sides, which round differently; 1e-5 was measured for log-probs of the order of 10 nats. A tensor in
# the wrong place moves them by more than 0.1.
TOLERANCE = 5e-5
NUM_TOKENS = 10


@dataclass(frozen=True)
class Greedy:
    """What the policy itself completes greedily, and what it says of it."""

    prompt: list[int]
    response: list[int]
    logits: Tensor
    """[L, VOCAB_SIZE] float32 at every token of prompt and response."""
    log_probs: np.ndarray
    """[L - 1] float32: of every token but the first."""

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.response


def train_and_export(rank: int, source: Path, output: Path) -> list[Greedy]:
    """A step of fine-tuning, an export, and greedy completions."""
    from megatron_rl.checkpoint.hf_export import export_hf
    from tests.distributed.test_conversion import policy_log_probs, train_a_step
    from tests.distributed.training_ranks import start_policy

    policy = start_policy(source, "tp2")
    train_a_step(policy)
    export_hf(policy, output)
    generator = torch.Generator().manual_seed(2)
    completions = []
    for length in (3, 20, 40):
        prompt = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        response: list[int] = []
        while len(response) < NUM_TOKENS and EOS_TOKEN_ID not in response:
            response.append(int(policy_logits(policy.models[0], prompt + response)[-1].argmax()))
        logits = policy_logits(policy.models[0], prompt + response)
        (log_probs,) = policy_log_probs(policy, [prompt + response])
        completions.append(Greedy(prompt, response, logits, log_probs))
    return completions


@torch.no_grad()
def policy_logits(gpt: torch.nn.Module, token_ids: list[int]) -> Tensor:
    ids, positions = torch.tensor(token_ids)[None], torch.arange(len(token_ids))[None]
    shard = gpt(ids, positions, attention_mask=None)[0].contiguous()
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard)
    return torch.cat(shards, dim=1)[:, :VOCAB_SIZE].clone()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3", seed=8)


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    return source.parent / "exported"


@pytest.fixture(scope="module")
def completions(source: Path, exported: Path) -> list[Greedy]:
    first, second = run_ranks(train_and_export, 2, source, exported, timeout_s=300.0)
    assert [greedy.response for greedy in first] == [greedy.response for greedy in second]
    return first


def test_in_transformers(source: Path, exported: Path, completions: list[Greedy]) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    for greedy in completions:
        ids = torch.tensor(greedy.token_ids)
        with torch.no_grad():
            logits, old_logits = model(ids[None]).logits[0], before(ids[None]).logits[0]
            generated = model.generate(
                torch.tensor([greedy.prompt]), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=EOS_TOKEN_ID
            )
        torch.testing.assert_close(logits, greedy.logits, rtol=0, atol=TOLERANCE)
        log_probs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        np.testing.assert_allclose(log_probs.numpy(), greedy.log_probs, rtol=0, atol=TOLERANCE)
        assert generated[0, len(greedy.prompt) :].tolist() == greedy.response
        # The step moved the logits by far more than the tolerance: it is the trained policy that was compared.
        assert float((old_logits - logits).abs().max()) > 0.1
    assert AutoTokenizer.from_pretrained(exported).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()


@pytest.fixture(scope="module")
def engine(exported: Path, completions: list[Greedy]) -> Iterator[RolloutEngine]:
    engine = RolloutEngine(
        model_path=exported, dtype="float32", max_model_len=64, max_num_seqs=8, kv_cache_gigabytes=0.02
    )
    yield engine
    engine.shutdown()


def test_in_vllm(engine: RolloutEngine, completions: list[Greedy]) -> None:
    for greedy, log_probs in zip(completions, engine.log_probs([g.token_ids for g in completions]), strict=True):
        np.testing.assert_allclose(log_probs, greedy.log_probs, rtol=0, atol=TOLERANCE)
    prompts = [
        Prompt(prompt_id=i, token_ids=tuple(greedy.prompt), text="", answer=None, source="")
        for i, greedy in enumerate(completions)
    ]
    sampling = Sampling(temperature=0.0, max_response_tokens=NUM_TOKENS)
    generated = engine.generate(prompts, num_samples=1, sampling=sampling, seeds=[0] * len(prompts))
    for greedy, (completion,) in zip(completions, generated, strict=True):
        assert list(completion.token_ids) == greedy.response
        expected = greedy.log_probs[len(greedy.prompt) - 1 :]
        np.testing.assert_allclose(completion.log_probs, expected, rtol=0, atol=TOLERANCE)
