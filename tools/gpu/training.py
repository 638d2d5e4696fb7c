"""The GPU qualification of a training step: use of the GPU in bfloat16 and FP8, and its curve against the host."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.gpu.measure import DEVICE, Figures, model_folder, peak_bytes, product_rate, seconds_of, world


def training_step(quick: bool, *, length: int = 2048, changes: dict[str, Any] | None = None, **model: Any) -> Figures:
    """Utilisation of forward, backward and update, on micro-batches of sequences of `length` tokens."""
    from megatron_rl.config.schema import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig
    from megatron_rl.engine.optimizer import Optimizer
    from megatron_rl.engine.policy import Policy
    from megatron_rl.engine.step import forward_backward
    from megatron_rl.objectives.objectives import SupervisedObjective

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
        forward_backward(policy, batch.micro_batches, objective)
        optimizer.step()

    seconds = seconds_of(step, repetitions=3 if quick else 5)
    extra = peak_bytes(step)
    floor = _products_of_a_step(policy, [len(micro_batch.tokens) for micro_batch in batch.micro_batches])
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
    """Sequences of `length` predicted tokens, four in a micro-batch."""
    import numpy as np

    from megatron_rl.data.samples import TrainingSequence
    from megatron_rl.objectives.minibatch import MiniBatch

    rng = np.random.default_rng(0)
    sequences = [
        TrainingSequence(rng.integers(0, policy.hf["vocab_size"], size=length + 1), np.ones(length, dtype=np.float32))
        for _ in range(num_sequences)
    ]
    places = range(num_sequences)
    return MiniBatch.of(
        sequences, places, policy.groups, micro_batch_tokens=4 * length, pad_to_multiple=policy.token_multiple
    )


def _products_of_a_step(policy: Any, micro_batches: Sequence[int]) -> float:
    """Seconds of a step's bfloat16 products with the model's weights, each timed in its own shape, attention's not.

    Per weight [N, K] and micro-batch of T tokens three: [T, K] x [K, N], its input's gradient, its weight's.
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

    of_micro_batch = {
        tokens: sum(count * seconds(tokens, *shape) for shape, count in shapes.items()) for tokens in set(micro_batches)
    }
    return sum(of_micro_batch[tokens] for tokens in micro_batches)


def train_bf16(quick: bool) -> Figures:
    """Utilisation in bfloat16."""
    return training_step(quick)


def train_fp8(quick: bool) -> Figures:
    """Utilisation with FP8 layers, by the best recipe that the GPU has."""
    from megatron_rl.config.schema import Fp8Format, Fp8Recipe

    recipes = ((10, 0), Fp8Recipe.mxfp8), ((9, 0), Fp8Recipe.blockwise), ((0, 0), Fp8Recipe.tensorwise)
    recipe = next(recipe for oldest, recipe in recipes if torch.cuda.get_device_capability() >= oldest)
    return {"recipe": recipe.value} | training_step(quick, fp8=Fp8Format.e4m3, fp8_recipe=recipe)


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
