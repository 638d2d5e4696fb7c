"""The rollout engine against transformers: real checkpoints, one process.

Everything is float32. The two sides round differently: log-probs of these checkpoints, which are of the order of 10
nats, differ by up to 1e-5 here. `LOG_PROB_TOLERANCE` is five times that; a tensor that was not replaced shifts them by
more than 0.1. A process has one engine at a time, so the families come first and the rest shares one engine.
"""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.sampling import RolloutError, Sampling, sample_seed
from tests.checkpoints import EOS_TOKEN_ID, PLAIN, VOCAB_SIZE, make_checkpoint, make_tokenizer

LOG_PROB_TOLERANCE = 5e-5
MAX_MODEL_LEN = 256
GREEDY = Sampling(temperature=0.0, max_response_tokens=12)


def make_prompt(length: int, seed: int = 0) -> Prompt:
    ids = torch.randint(
        3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)
    ).tolist()
    return Prompt(prompt_id=seed, token_ids=tuple(ids), text="", answer=None, source=f"prompts.jsonl:{seed + 1}")


class Reference:
    """transformers' model of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    @torch.no_grad()
    def logits(self, prompt: Prompt, completion: Completion) -> Tensor:
        """[num_response_tokens, VOCAB_SIZE]: what each token of the completion was drawn from."""
        ids = torch.tensor([*prompt.token_ids, *completion.token_ids])
        return self.model(ids[None]).logits[0, len(prompt.token_ids) - 1 : -1]

    @torch.no_grad()
    def log_probs(self, sequence: tuple[int, ...]) -> Tensor:
        """[L - 1]: of every token but the first."""
        ids = torch.tensor(sequence)
        return gather(self.model(ids[None]).logits[0, :-1].log_softmax(-1), ids[1:])


def gather(log_probs: Tensor, token_ids: tuple[int, ...] | Tensor) -> Tensor:
    return log_probs.gather(1, torch.as_tensor(token_ids)[:, None])[:, 0]


def assert_close(actual: object, expected: Tensor, tolerance: float = LOG_PROB_TOLERANCE) -> None:
    torch.testing.assert_close(torch.tensor(actual), expected, rtol=0, atol=tolerance)


def start(folder: Path, **overrides: object) -> RolloutEngine:
    arguments = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 64, "kv_cache_gigabytes": 0.02}
    return RolloutEngine(model_path=folder, **(arguments | overrides))  # type: ignore[arg-type]


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    yield from load_file(folder / "model.safetensors").items()


@dataclass
class ReloadCase:
    """An engine that started from the first of three checkpoints of a family."""

    family: str
    folders: list[Path]
    engine: RolloutEngine


class TestReload:
    @pytest.fixture(scope="class", params=PLAIN)
    def case(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReloadCase]:
        family = request.param
        folders = [make_checkpoint(tmp_path_factory.mktemp(family), family, seed) for seed in (1, 2, 3)]
        engine = start(folders[0])
        yield ReloadCase(family, folders, engine)
        engine.shutdown()

    def test_reloaded_weights_are_those_of_a_fresh_model(self, case: ReloadCase) -> None:
        references = [Reference(folder) for folder in case.folders]
        # 200 tokens fill 6 blocks of the cache of prefixes: keys of the old weights would be found there.
        prompts = [make_prompt(length) for length in (2, 50, 200)]
        for version, which in enumerate((0, 1, 2, 1)):
            if version:
                case.engine.load_weights(weights(case.folders[which]), version=version)
            for prompt, log_probs in zip(prompts, case.engine.log_probs([p.token_ids for p in prompts]), strict=True):
                assert_close(log_probs, references[which].log_probs(prompt.token_ids))
            completions = case.engine.generate(prompts, num_samples=1, sampling=GREEDY, seeds=[0] * 3)
            for prompt, (completion,) in zip(prompts, completions, strict=True):
                logits = references[which].logits(prompt, completion)
                # The argmax after every prefix of the completion: by induction, transformers' own greedy completion.
                assert completion.token_ids == tuple(logits.argmax(-1).tolist())
                assert_close(completion.log_probs, gather(logits.log_softmax(-1), completion.token_ids))
                assert completion.weight_version == version

    def test_a_missing_tensor_is_an_error_that_names_it(self, case: ReloadCase) -> None:
        """Comes second: it leaves the engine without weights."""
        version = case.engine.weight_version
        if case.family == "qwen2":
            # q/k/v are fused: weights [(4 + 2 + 2) heads * 32, 128] and biases are 33024 elements, k's weights 8192.
            dropped = "model.layers.1.self_attn.k_proj.weight"
            message = r"lack model\.layers\.1\.self_attn\.qkv_proj \(24832 of 33024 elements\)$"
        else:
            dropped = "model.layers.0.input_layernorm.weight"
            message = r"lack model\.layers\.0\.input_layernorm\.weight$"
        with pytest.raises(RuntimeError, match=message):
            case.engine.load_weights(((n, t) for n, t in weights(case.folders[0]) if n != dropped), version=9)
        assert case.engine.weight_version == version


def test_a_tensor_that_comes_twice_is_an_error() -> None:
    from megatron_rl.rollout.weight_loading import each_once

    tensors = each_once([("a", torch.ones(1)), ("b", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(RuntimeError, match="hold a twice"):
        list(tensors)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2", 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"engine_args": {"block_sise": 32}}, "rollout.engine_args.block_sise: .* the nearest is block_size$"),
        ({"engine_args": {"seed": 1}}, "rollout.engine_args.seed cannot be given: other keys of rollout decide it"),
    ],
)
def test_engine_arguments_that_cannot_be_are_refused(
    checkpoint: Path, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(RolloutError, match=message):
        start(checkpoint, **overrides)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[RolloutEngine]:
    # Small on purpose. 256 prompt tokens per step: a batch of prompts is prefilled over several steps. 600 tokens of
    # keys and values, each 2 layers * 2 (k, v) * 2 heads * 32 * 4 bytes = 1 KiB: see the test of preemption.
    engine = start(
        checkpoint, engine_args={"max_num_batched_tokens": MAX_MODEL_LEN}, kv_cache_gigabytes=600 * 1024 / 1e9
    )
    yield engine
    engine.shutdown()


def test_log_probs_are_those_of_the_tempered_distribution(engine: RolloutEngine, reference: Reference) -> None:
    prompts = [make_prompt(20 * n, n) for n in range(1, 5)]
    sampling = Sampling(temperature=0.7, max_response_tokens=16)
    for prompt, group in zip(
        prompts, engine.generate(prompts, num_samples=2, sampling=sampling, seeds=range(4)), strict=True
    ):
        for completion in group:
            log_probs = (reference.logits(prompt, completion) / 0.7).log_softmax(-1)
            assert_close(completion.log_probs, gather(log_probs, completion.token_ids))


def test_a_nucleus_is_renormalised(engine: RolloutEngine, reference: Reference) -> None:
    prompt = make_prompt(30)
    sampling = Sampling(temperature=1.0, top_p=0.6, max_response_tokens=16)
    (group,) = engine.generate([prompt], num_samples=4, sampling=sampling, seeds=[5])
    for completion in group:
        log_probs = reference.logits(prompt, completion).log_softmax(-1)
        ordered = log_probs.exp().sort(-1, descending=True).values
        # The nucleus is every token before which less than 0.6 is spent.
        mass = (ordered * (ordered.cumsum(-1) - ordered < 0.6)).sum(-1)
        assert_close(completion.log_probs, gather(log_probs, completion.token_ids) - mass.log())


def test_tokens_are_drawn_from_the_reported_distribution(engine: RolloutEngine, reference: Reference) -> None:
    prompt = make_prompt(30)
    (group,) = engine.generate([prompt], num_samples=512, sampling=Sampling(max_response_tokens=1), seeds=[11])
    log_probs = reference.logits(prompt, group[0])[0].double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum()
    surprise_std = ((log_probs.exp() * log_probs.square()).sum() - entropy.square()).sqrt()
    mean_surprise = -np.mean([completion.log_probs[0] for completion in group])
    # The mean surprise of n draws has the entropy as its expectation and surprise_std / sqrt(n) as its deviation.
    assert abs(mean_surprise - entropy) < 3 * surprise_std / 512**0.5
    assert len({completion.token_ids for completion in group}) > 50


def test_a_sample_depends_on_its_seed_and_number_alone(engine: RolloutEngine) -> None:
    prompts = [make_prompt(length, seed) for seed, length in enumerate((5, 40, 70, 130))]
    sampling, seeds = Sampling(max_response_tokens=16), [3, 1, 4, 1]
    together = engine.generate(prompts, num_samples=3, sampling=sampling, seeds=seeds)
    (alone,) = engine.generate(prompts[2:3], num_samples=5, sampling=sampling, seeds=[4])
    assert [c.token_ids for c in alone[:3]] == [c.token_ids for c in together[2]]
    reverse = engine.generate(prompts[::-1], num_samples=3, sampling=sampling, seeds=seeds[::-1])
    assert [[c.token_ids for c in group] for group in reverse[::-1]] == [[c.token_ids for c in g] for g in together]
    assert len({c.token_ids for c in alone}) == 5
    neighbours = engine.generate(prompts[2:3] * 2, num_samples=3, sampling=sampling, seeds=[5, 6])
    assert not {c.token_ids for c in neighbours[0]} & {c.token_ids for c in neighbours[1]}


def test_sample_seeds_fit_a_signed_64_bit_integer_and_differ() -> None:
    seeds = [sample_seed(seed, sample) for seed in (0, 1, 2**63) for sample in range(100)]
    assert len(set(seeds)) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_preempted_samples_are_the_same(engine: RolloutEngine) -> None:
    # 18 blocks of 32 tokens. Four prompts of 100 tokens take 16 of them, and each wants a fifth for its 129th token:
    # two sequences lose theirs, wait, and are computed again from their prompt and what they had sampled.
    prompts = [make_prompt(100, seed) for seed in range(8)]
    sampling, seeds = Sampling(max_response_tokens=60), list(range(8))
    together = engine.generate(prompts, num_samples=1, sampling=sampling, seeds=seeds)
    for prompt, seed, (completion,) in zip(prompts, seeds, together, strict=True):
        ((alone,),) = engine.generate([prompt], num_samples=1, sampling=sampling, seeds=[seed])
        assert completion.token_ids == alone.token_ids


def test_finish_reasons(engine: RolloutEngine) -> None:
    prompts = [make_prompt(30, seed) for seed in range(16)]
    groups = engine.generate(prompts, num_samples=4, sampling=Sampling(max_response_tokens=60), seeds=range(16))
    completions = [completion for group in groups for completion in group]
    for completion in completions:
        ended = completion.token_ids[-1] == EOS_TOKEN_ID
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == 60
        assert EOS_TOKEN_ID not in completion.token_ids[:-1]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_a_stop_string_ends_a_completion_and_stays_in_it(engine: RolloutEngine) -> None:
    prompt, sampling = make_prompt(30), Sampling(max_response_tokens=24)
    ((free,),) = engine.generate([prompt], num_samples=1, sampling=sampling, seeds=[2])
    letter, cut = next((make_tokenizer().decode([i]), n) for n, i in enumerate(free.token_ids) if 3 <= i < 97 and n > 3)
    first = free.text.index(letter)
    stopping = Sampling(max_response_tokens=24, stop=(letter,))
    ((stopped,),) = engine.generate([prompt], num_samples=1, sampling=stopping, seeds=[2])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) <= cut + 1
    assert stopped.text == free.text[: first + 1]
    assert len(stopped.log_probs) == len(stopped.token_ids)


def test_responses_are_cut_where_the_engine_ends(engine: RolloutEngine) -> None:
    prompts = [make_prompt(MAX_MODEL_LEN - 1), make_prompt(MAX_MODEL_LEN - 6)]
    sampling = Sampling(max_response_tokens=20)
    (one,), (six,) = engine.generate(prompts, num_samples=1, sampling=sampling, seeds=[1, 1])  # no end token
    assert (len(one.token_ids), one.finish_reason) == (1, "length")
    assert (len(six.token_ids), six.finish_reason) == (6, "length")
    too_long = make_prompt(MAX_MODEL_LEN, 3)
    with pytest.raises(RolloutError, match=r"prompt 3 \(prompts.jsonl:4\) has 256 tokens; .* allows 1 to 255"):
        engine.generate([too_long], num_samples=1, sampling=sampling, seeds=[0])
    with pytest.raises(RolloutError, match="sequence 1 has 1 tokens; log-probs need 2 to 255"):
        engine.log_probs([(5, 6), (5,)])


def test_text_is_the_decoded_response_without_special_tokens(engine: RolloutEngine) -> None:
    sampling = Sampling(max_response_tokens=60)
    groups = engine.generate([make_prompt(30, s) for s in range(4)], num_samples=4, sampling=sampling, seeds=range(4))
    completions = [completion for group in groups for completion in group]
    tokenizer = make_tokenizer()
    for completion in completions:
        assert completion.text == tokenizer.decode([i for i in completion.token_ids if i > EOS_TOKEN_ID])
    assert any(EOS_TOKEN_ID in completion.token_ids for completion in completions)


def test_progress_counts_completions_and_may_raise(engine: RolloutEngine) -> None:
    prompts, sampling = [make_prompt(30, seed) for seed in range(6)], Sampling(max_response_tokens=40)
    finished: list[int] = []
    expected = engine.generate(prompts, num_samples=2, sampling=sampling, seeds=range(6), on_progress=finished.append)
    assert sum(finished) == 12
    assert len(finished) > 1

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, num_samples=2, sampling=sampling, seeds=range(6, 12), on_progress=interrupt)
    finished.clear()
    again = engine.generate(prompts, num_samples=2, sampling=sampling, seeds=range(6), on_progress=finished.append)
    assert again == expected
    assert sum(finished) == 12
    assert engine.generate([], num_samples=2, sampling=sampling, seeds=[]) == []


def test_generation_leaves_the_random_states_alone(engine: RolloutEngine) -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]

    before = states()
    engine.generate([make_prompt(9)], num_samples=2, sampling=Sampling(max_response_tokens=4), seeds=[1])
    engine.log_probs([make_prompt(9).token_ids])
    assert states() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.001}, r"sampling.temperature is 0.001; it may be 0 or in \[0.01, 2.0\]"),
        ({"temperature": float("nan")}, "sampling.temperature is nan"),
        ({"top_p": 0.0}, r"sampling.top_p is 0.0; it may be in \(0, 1\]"),
        ({"max_response_tokens": 0}, "sampling.max_response_tokens is 0; it must be at least 1"),
        ({"stop": ("",)}, "sampling.stop has an empty string"),
    ],
)
def test_sampling_that_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        Sampling(**arguments)  # type: ignore[arg-type]


GUEST_PROGRAM = """
import gc, logging, os, random, sys, tempfile
import numpy as np, torch, torch.distributed as dist
from megatron_rl.data.samples import Prompt
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.sampling import Sampling

store = dist.FileStore(tempfile.mktemp(), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)

def state():
    root = logging.getLogger()
    ours = {n: v for n, v in os.environ.items() if not n.startswith("VLLM_")}
    return dict(
        python=random.getstate(), numpy=np.random.get_state()[1].tolist(), torch=torch.get_rng_state().tolist(),
        threads=torch.get_num_threads(), set_num_threads=torch.set_num_threads, dtype=torch.get_default_dtype(),
        device=torch.get_default_device(), grad=torch.is_grad_enabled(), frozen=gc.get_freeze_count(),
        root_log=(root.level, list(root.handlers)), environment=ours, world=dist.group.WORLD,
        cuda=[getattr(torch.cuda, name) for name in ("Event", "Stream", "current_stream", "stream")],
    )

torch.set_num_threads(2)
before = state()
engine = RolloutEngine(model_path=sys.argv[1], dtype="float32", max_model_len=64, kv_cache_gigabytes=0.02)
after_start = state()
prompt = Prompt(prompt_id=0, token_ids=(5, 6, 7), text="", answer=None, source="")
engine.generate([prompt], num_samples=2, sampling=Sampling(max_response_tokens=4), seeds=[0])
engine.sleep(); engine.wake_up()
engine.shutdown()
del engine
gc.collect()
after_shutdown = state()
for name, value in before.items():
    assert after_start[name] == value, ("start", name)
    assert after_shutdown[name] == value, ("shutdown", name)
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == 1
"""


def test_vllm_is_a_quiet_guest_of_the_process(checkpoint: Path) -> None:
    # TORCH_CPP_LOG_LEVEL: one line of C++ about memory binding; torch reads the variable when it is imported.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "2"}
    program = [sys.executable, "-c", GUEST_PROGRAM, str(checkpoint)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
