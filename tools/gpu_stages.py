"""The stages of the GPU qualification: `python tools/gpu_stages.py STAGE [--quick]` prints its figures as JSON.

Times are medians over repetitions after a warm-up, with the device synchronised. The rate that utilisation is measured
against is the one that this GPU reaches on a large bfloat16 product in the same process, not a data sheet's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Figures = dict[str, Any]


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(STAGES[arguments.stage](arguments.quick)))


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], repetitions: int = 10) -> float:
    """Median time of `work`."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repetitions):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most device memory that `work` held beyond what was there."""
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def product_rate(size: int = 8192) -> float:
    """FLOP/s of a bfloat16 product of two square matrices."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b)


def tests(quick: bool) -> Figures:
    """pytest over tests/gpu; fails if one of them does."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        ended = subprocess.run([sys.executable, "-m", "pytest", "tests/gpu", f"--junitxml={report}"], cwd=ROOT)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
        skipped = [
            f"{case.get('name')}: {skip.get('message')}"
            for case in ElementTree.parse(report).getroot().iter("testcase")
            for skip in case.iter("skipped")
        ]
    if ended.returncode:
        sys.exit(ended.returncode)
    return {"tests": int(suite["tests"]), "skipped": skipped}


RATE_AIM, BYTES_AIM = 0.70, 10_000
"""Of the log-prob heads at the shape below: the part of the products' rate, and extra memory per token."""


def log_prob_head(quick: bool, tokens: int = 16_384, hidden: int = 4096, vocab: int = 151_936) -> Figures:
    """Forward and backward of both fused heads against the three products that they cannot do without."""
    from megatron_rl.parallel.fused_linear_log_probs import fused_linear_log_probs
    from megatron_rl.parallel.fused_linear_token_loss import fused_linear_token_loss

    tokens = tokens // 4 if quick else tokens
    states = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, hidden, device=DEVICE, dtype=torch.bfloat16) * hidden**-0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=DEVICE)
    main_grad = torch.zeros(vocab, hidden, device=DEVICE, dtype=torch.float32)
    given = dict(group=None, vocab_size=vocab, main_grad=main_grad)

    def two_pass() -> None:
        states.grad = None
        log_probs, entropy = fused_linear_log_probs(states, weight, labels, **given)
        assert entropy is not None
        (log_probs.sum() + entropy.sum()).backward()

    def single_pass() -> None:
        states.grad = None
        loss, *_ = fused_linear_token_loss(states, weight, labels, lambda lp, entropy, t: lp + entropy, **given)
        loss.backward()

    floor = _three_products(states.detach(), weight.detach())
    found: Figures = {"shape": f"{tokens} tokens x {hidden} x {vocab}", "floor_ms": 1e3 * floor}
    # The states' own gradient, which every method makes, is not extra.
    own = states.numel() * states.element_size()
    for name, head in (("two_pass", two_pass), ("single_pass", single_pass)):
        seconds, extra = seconds_of(head), (peak_bytes(head) - own) / tokens
        found |= {
            f"{name}_ms": 1e3 * seconds,
            f"{name}_part_of_product_rate": floor / seconds,
            f"{name}_extra_bytes_per_token": extra,
            f"{name}_aims": f"rate {_met(floor / seconds >= RATE_AIM)}, memory {_met(extra <= BYTES_AIM)}",
        }
    return found | {"logits_would_be_MiB": tokens * vocab * 2 / 2**20, **_head_error()}


def _met(aim: bool) -> str:
    return "met" if aim else "not met"


def _three_products(states: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds of the logits, of the states' gradient and of the weight's, as products of whole matrices."""
    logits = torch.randn(len(states), len(weight), device=DEVICE, dtype=states.dtype)

    def products() -> None:
        torch.mm(states, weight.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), states)

    return seconds_of(products)


def _head_error() -> Figures:
    """Largest error of log-probs and of the hidden states' gradient against float64, on a shape that fits it."""
    from megatron_rl.parallel.fused_linear_log_probs import fused_linear_log_probs

    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(300, 128, generator=generator), torch.randn(1000, 128, generator=generator) / 8
    labels = torch.randint(1000, (300,), generator=generator)
    found = []
    for dtype, device in ((torch.float64, torch.device("cpu")), (torch.float32, DEVICE)):
        h, w = states.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_()
        if dtype is torch.float64:
            log_probs = (h @ w.t()).log_softmax(1).gather(1, labels[:, None])[:, 0]
        else:
            log_probs, _ = fused_linear_log_probs(h, w, labels.to(device), group=None, vocab_size=1000)
        log_probs.sum().backward()
        assert h.grad is not None
        found.append((log_probs.detach().cpu().double(), h.grad.cpu().double()))
    (exact, exact_gradient), (head, gradient) = found
    return {
        "log_probs_error_against_float64": float((head - exact).abs().max()),
        "gradient_error_against_float64": float((gradient - exact_gradient).abs().max()),
    }


SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, head_dim=128),
}


def model_folder(folder: Path, shape: str, **changes: Any) -> Path:
    """A Hugging Face folder with a config.json and no weights: they are drawn at random."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | SHAPES[shape] | changes))
    return folder


def world() -> Any:
    """Groups of this process alone."""
    import torch.distributed as dist

    from megatron_rl.config.schema import ParallelConfig
    from megatron_rl.device import distributed_backend
    from megatron_rl.engine.initialize import initialize

    dist.init_process_group(distributed_backend(), store=dist.HashStore(), rank=0, world_size=1)
    return initialize(ParallelConfig(), seed=0)


def _train(quick: bool, *, length: int = 2048, changes: dict[str, Any] | None = None, **model: Any) -> Figures:
    """Utilisation of forward, backward and update, on packed rows of sequences of `length` tokens."""
    from megatron_rl.config.schema import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig
    from megatron_rl.engine.optimizer import Optimizer
    from megatron_rl.engine.policy import Policy
    from megatron_rl.engine.step import forward_backward
    from megatron_rl.trainer.objectives import SupervisedObjective

    # 18 bytes per parameter: weight, float32 gradient, float32 copy, two moments.
    room = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 0
    shape = "8B" if room > 18 * 10 * 10**9 and not quick else "1B"
    num_sequences = 4 if quick else 16
    rate = product_rate(8192 if DEVICE.type == "cuda" else 512)
    groups = world()
    with tempfile.TemporaryDirectory() as folder:
        path = model_folder(Path(folder), shape, **(changes or {}))
        settings = ModelConfig(hf_path=str(path), load_weights=False, recompute_granularity="selective", **model)
        policy = Policy(settings, groups, ParallelConfig())
        optimizer = Optimizer(OptimizerConfig(), policy, num_steps=1000)
    batch = _random_batch(policy, num_sequences, length)
    objective = SupervisedObjective(AlgorithmConfig(), batch.counts, token_sum_norm=1.0)

    def step() -> None:
        optimizer.zero_grad()
        forward_backward(policy, batch.rows, objective)
        optimizer.step()

    seconds = seconds_of(step, repetitions=3 if quick else 5)
    extra = peak_bytes(step)
    floor = _products_of_a_step(policy, [len(row.tokens) for row in batch.rows])
    hf, tokens = policy.hf, num_sequences * length
    weights = sum(p.numel() for name, p in policy.parameters.items() if not name.startswith("embedding."))
    # 6 FLOP per weight and token; attention: 2 products of length x channels, halved by causality, times 3.
    attention = 6 * hf["num_hidden_layers"] * hf["num_attention_heads"] * hf["head_dim"] * length
    flop = tokens * (6 * weights + attention)
    return {
        "shape": f"{shape}, {weights / 1e9:.2f}G weights in products, {tokens} tokens",
        "choices": str(policy.choices),
        "step_s": seconds,
        "tokens_per_s": tokens / seconds,
        "model_TFLOP_per_s": flop / seconds / 1e12,
        "bf16_product_TFLOP_per_s": rate / 1e12,
        "utilisation_of_product_rate": flop / seconds / rate,
        "floor_of_bf16_products_s": floor,
        "step_over_floor": seconds / floor,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0,
        "peak_of_the_step_GiB": extra / 2**30,
    }


def _random_batch(policy: Any, num_sequences: int, length: int) -> Any:
    """Sequences of `length` predicted tokens, four in a row."""
    import numpy as np

    from megatron_rl.data.samples import TrainingSequence
    from megatron_rl.trainer.minibatch import MiniBatch

    rng = np.random.default_rng(0)
    sequences = [
        TrainingSequence(rng.integers(0, policy.hf["vocab_size"], size=length + 1), np.ones(length, dtype=np.float32))
        for _ in range(num_sequences)
    ]
    places = range(num_sequences)
    return MiniBatch.of(
        sequences, places, policy.groups, micro_batch_tokens=4 * length, pad_to_multiple=policy.row_multiple
    )


def _products_of_a_step(policy: Any, rows: Sequence[int]) -> float:
    """Seconds of a step's bfloat16 products with the model's weights, each timed in its own shape, attention's not.

    Per weight [N, K] and row of T tokens three: [T, K] x [K, N], its input's gradient, its weight's.
    """
    shapes = Counter(
        tuple(parameter.shape)
        for name, parameter in policy.parameters.items()
        if parameter.dim() == 2 and not name.startswith("embedding.")
    )

    def seconds(tokens: int, n: int, k: int) -> float:
        x, y, w = (
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((tokens, k), (tokens, n), (n, k))
        )
        return seconds_of(lambda: (x @ w.t(), y @ w, y.t() @ x), repetitions=3)

    of_row = {tokens: sum(count * seconds(tokens, *shape) for shape, count in shapes.items()) for tokens in set(rows)}
    return sum(of_row[tokens] for tokens in rows)


def train_bf16(quick: bool) -> Figures:
    """Utilisation in bfloat16."""
    return _train(quick)


def train_fp8(quick: bool) -> Figures:
    """Utilisation with FP8 layers, by the best recipe that the GPU has."""
    from megatron_rl.config.schema import Fp8Format, Fp8Recipe

    recipes = ((10, 0), Fp8Recipe.mxfp8), ((9, 0), Fp8Recipe.blockwise), ((0, 0), Fp8Recipe.tensorwise)
    recipe = next(recipe for oldest, recipe in recipes if torch.cuda.get_device_capability() >= oldest)
    return {"recipe": recipe.value} | _train(quick, fp8=Fp8Format.e4m3, fp8_recipe=recipe)


def _engine_and_policy(folder: Path, shape: str, *, batch_invariant: bool = False) -> tuple[Any, Any]:
    from megatron_rl.config.schema import ModelConfig, ParallelConfig
    from megatron_rl.engine.policy import Policy
    from megatron_rl.rollout.engine import RolloutEngine
    from tests.checkpoints import make_tokenizer

    groups = world()
    path = model_folder(folder, shape)
    make_tokenizer().save_pretrained(path)
    settings = ModelConfig(hf_path=str(path), load_weights=False, batch_invariant_mode=batch_invariant)
    policy = Policy(settings, groups, ParallelConfig(), trained=False)
    engine = RolloutEngine(
        model_path=path,
        max_model_len=4096,
        gpu_memory_utilization=0.4,
        batch_invariant=batch_invariant,
        engine_args={"load_format": "dummy"},
    )
    return policy, engine


def weight_sync(quick: bool) -> Figures:
    """A sync inside the process, as a run makes it, against a copy of as many bytes on the device."""
    from datetime import timedelta

    from megatron_rl.device import this_device
    from megatron_rl.trainer.sync import plan_sync, trained_ranks
    from megatron_rl.weights.exchange import Exchange, Orders
    from megatron_rl.weights.holders import EngineRanks
    from megatron_rl.weights.process_group import ProcessGroupTransport

    with tempfile.TemporaryDirectory() as folder:
        policy, engine = _engine_and_policy(Path(folder), "1B")
        num_bytes = sum(p.numel() * p.element_size() for p in policy.parameters.values())
        trained = trained_ranks(policy)
        engines = EngineRanks(
            num_engines=1, tensor=1, stage_of_layer=(0,) * len(trained.stage_of_layer), first_rank=0, num_experts=0
        )
        orders = Orders.of(plan_sync(policy, trained, engines, bucket_bytes=256 << 20), 0, engines.expert_rows(0))
        transport = ProcessGroupTransport(policy.groups.world, timeout=timedelta(seconds=60), device=this_device())
        exchange = Exchange(orders)
        version = 0

        def shards() -> None:
            nonlocal version
            version += 1
            feed = lambda loader: exchange.run(policy.parameters, loader, transport, version=version)  # noqa: E731
            engine.load_shards(orders.shard, feed, version=version)

        def whole() -> None:
            engine.load_weights(policy.hf_tensors(bucket_bytes=256 << 20), version=version)

        repetitions = 2 if quick else 5
        seconds, of_whole, extra = seconds_of(shards, repetitions), seconds_of(whole, repetitions), peak_bytes(shards)
        source = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        copied = seconds_of(lambda: target.copy_(source))
    return {
        "GB": num_bytes / 1e9,
        "sync_s": seconds,
        "sync_GB_per_s": num_bytes / seconds / 1e9,
        "sync_peak_MiB": extra / 2**20,
        "whole_tensors_s": of_whole,
        "device_copy_GB_per_s": num_bytes / copied / 1e9,
        "sync_over_copy": seconds / copied,
    }


def curve(quick: bool) -> Figures:
    """Losses of 20 steps in float32 and bfloat16 on this device, against float32 on the host."""
    from megatron_rl.config.schema import AdamImplementation, Dtype, LayerSpec
    from tests.checkpoints import make_checkpoint
    from tests.gpu.curve import curve as losses_of
    from tests.gpu.curve import curve_of_the_host

    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    groups = world()
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name), "qwen3_untied", 1, **sizes)
        host = curve_of_the_host(folder)
        kinds: dict[str, Any] = {
            "float32_portable": dict(dtype=Dtype.float32, adam=AdamImplementation.torch, layer_spec=LayerSpec.portable),
            "bf16": dict(dtype=Dtype.bfloat16, adam=AdamImplementation.auto),
        }
        found: Figures = {"host_first_and_last_loss": [host[0], host[-1]]}
        for kind, settings in kinds.items():
            losses = losses_of(folder, groups, **settings)
            found[f"{kind}_largest_relative_difference"] = max(
                abs(a - b) / abs(b) for a, b in zip(losses, host, strict=True)
            )
    return found


def _rollout_and_difference(batch_invariant: bool, quick: bool) -> Figures:
    """Time of generating and of log-probs, and how far the two sides' log-probs are apart."""
    from megatron_rl.data.packing import pack, unpack
    from megatron_rl.data.samples import Prompt, TrainingSequence
    from megatron_rl.engine.step import forward_log_probs
    from megatron_rl.rollout.sampling import Sampling

    with tempfile.TemporaryDirectory() as folder:
        policy, engine = _engine_and_policy(Path(folder), "1B", batch_invariant=batch_invariant)
        engine.load_weights(policy.hf_tensors(bucket_bytes=256 << 20), version=1)
        prompts = [Prompt(i, tuple(range(3, 35 + i)), "", None, "") for i in range(16 if quick else 64)]
        sampling = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=128)
        start = time.perf_counter()
        completions = engine.generate(prompts, num_samples=1, sampling=sampling, seeds=range(len(prompts)))
        generate_s = time.perf_counter() - start
    sequences, of_engine = [], []
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        ids = torch.tensor([*prompt.token_ids, *completion.token_ids]).numpy()
        sequences.append(TrainingSequence(ids, torch.ones(len(ids) - 1).numpy()))
        of_engine.append(torch.tensor(completion.log_probs))
    row = pack(sequences, range(len(sequences)), pad_to_multiple=16)
    start = time.perf_counter()
    ((log_probs, _),) = forward_log_probs(policy, [row])
    seconds = time.perf_counter() - start
    parts = zip(unpack(log_probs, row), of_engine, strict=True)
    difference = torch.cat([ours[-len(theirs) :] - theirs for ours, theirs in parts]).abs()
    return {
        "generate_s": generate_s,
        "log_probs_s": seconds,
        "log_prob_abs_diff_mean": float(difference.mean()),
        "log_prob_abs_diff_max": float(difference.max()),
        "log_probs_equal_fraction": float((difference == 0).float().mean()),
    }


def batch_invariance(quick: bool) -> Figures:
    """The same with and without batch-invariant kernels, each in a process of its own: they replace torch's."""
    found: Figures = {}
    for name in ("plain", "invariant"):
        command = [sys.executable, __file__, f"rollout_{name}", *(["--quick"] * quick)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(ended.stderr[-4000:])
        figures = json.loads(ended.stdout.strip().splitlines()[-1])
        found |= {f"{name}_{key}": value for key, value in figures.items()}
    return found


STAGES: dict[str, Callable[[bool], Figures]] = {
    "tests": tests,
    "log_prob_head": log_prob_head,
    "train_bf16": train_bf16,
    "train_fp8": train_fp8,
    "weight_sync": weight_sync,
    "curve": curve,
    "batch_invariance": batch_invariance,
    "rollout_plain": lambda quick: _rollout_and_difference(False, quick),
    "rollout_invariant": lambda quick: _rollout_and_difference(True, quick),
}


if __name__ == "__main__":
    main()
