"""Sizes, operations and memory by hand, of published models, and of what training really allocates."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import Config, Dtype
from megatron_rl.models.sizes import model_sizes
from megatron_rl.placement.layout import Layout
from megatron_rl.placement.plan import check_memory, plan
from megatron_rl.placement.sizes import mfu

PUBLISHED = Path(__file__).parents[2] / "published"
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "vocab_size": 5,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# q 8 x 12, k and v 8 x 6 each, o 12 x 8; gate, up, down 8 x 12 each.
MATRICES = 96 + 48 + 48 + 96 + 3 * 96
NORMS = 8 + 8 + 3 + 3


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PUBLISHED / name / "config.json").read_text())
    return config


def test_parameters_of_a_small_decoder() -> None:
    sizes = model_sizes(TINY)
    assert sizes.parameters == 40 + 2 * (MATRICES + NORMS) + 8 + 40
    assert sizes.active_matrices == 2 * MATRICES + 40
    assert sizes.cached == 2 * (3 + 3)
    tied = model_sizes(TINY | {"tie_word_embeddings": True})
    assert tied.parameters == sizes.parameters - 40
    assert tied.active_matrices == sizes.active_matrices


def test_operations_of_packed_sequences() -> None:
    """Sequences of 3 and 2 tokens see 1 + 2 + 3 and 1 + 2 keys; 4 heads of 3 + 3 channels, 2 layers."""
    sizes = model_sizes(TINY)
    assert sizes.training_flops([3, 2]) == 6 * (2 * MATRICES + 40) * 5 + 6 * 4 * 6 * 2 * (6 + 3)


def test_a_window_bounds_what_is_seen() -> None:
    """5 tokens with a window of 2 see 1 + 2 + 2 + 2 + 2 keys."""
    mistral = TINY | {"architectures": ["MistralForCausalLM"], "sliding_window": 2}
    sizes = model_sizes(mistral)
    assert [layer.window for layer in sizes.layers] == [2, 2]
    assert sizes.training_flops([5]) - 6 * sizes.active_matrices * 5 == 6 * 4 * 6 * 2 * 9


@pytest.mark.parametrize(("name", "billions", "active"), [("qwen3_235b_a22b", 235, 22), ("deepseek_v3", 671, 37)])
def test_published_sizes(name: str, billions: int, active: int) -> None:
    """The published counts, which are rounded to a billion."""
    sizes = model_sizes(published(name))
    assert round(sizes.parameters / 1e9) == billions
    # DeepSeek counts neither its embedding nor its output layer's copy twice; half a billion covers both readings.
    of_token = sum(layer.dense + sizes.topk * layer.expert for layer in sizes.layers) + sizes.output
    assert abs(of_token / 1e9 - active) < 1.0


@pytest.mark.parametrize(
    ("name", "length", "tokens_per_second", "tflops"),
    [
        ("llama3_8b", 8192, 14451, 744),
        ("llama3_70b", 8192, 1602, 719),
        ("llama3_405b", 8192, 292, 737),
        ("qwen3_30b_a3b", 4096, 28934, 666),
        ("qwen3_235b_a22b", 4096, 5350, 792),
    ],
)
def test_published_operations(name: str, length: int, tokens_per_second: float, tflops: float) -> None:
    """Tokens and operations per second of a GPU, published side by side: NVIDIA Megatron-Bridge, performance summary,
    container 25.11. Tokens are rounded to 1 in 292, operations to 1 in 666."""
    flops = model_sizes(published(name)).training_flops([length]) / length
    assert flops * tokens_per_second / 1e12 == pytest.approx(tflops, rel=5e-3)


def config_of(**parallel: Any) -> Config:
    config = Config(name="a")
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


def test_memory_by_hand() -> None:
    """Untied, two stages, tensor 2: the first stage has the embedding, the last the output layer and the last norm."""
    config = config_of(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    config.train.micro_batch_tokens = 10
    needed = plan(config, model_sizes(TINY, tp=2), Layout(2, 2, 4), tokens_per_step=100)
    layer = MATRICES // 2 + NORMS
    first, last = needed.stages
    assert first.parameters == layer + 24  # 3 of the 6 rows that 5 tokens are padded to
    assert last.parameters == layer + 24 + 8
    assert first.weights == 2 * first.parameters
    assert first.gradients == 4 * first.parameters
    assert first.optimizer == 12 * -(-first.parameters // 4)
    assert needed.num_micro_batches == 3  # 25 tokens on each replica
    assert needed.bubble == pytest.approx(1 / 4)
    config.optimizer.use_distributed_optimizer = False
    config.model.params_dtype = Dtype.float32
    whole = plan(config, model_sizes(TINY, tp=2), Layout(2, 2, 4), tokens_per_step=100).stages[0]
    assert (whole.weights, whole.optimizer) == (4 * first.parameters, 8 * first.parameters)


def test_experts_are_shared_by_other_ranks() -> None:
    """8 ranks: dense parts by tensor 2, experts by expert 4, of which each rank pair shares an optimizer."""
    hf = published("qwen3_235b_a22b") | {"num_hidden_layers": 1}
    config = config_of(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1)
    layout = Layout(2, 1, 4, expert_model_parallel_size=4, expert_tensor_parallel_size=1)
    sizes = model_sizes(hf, tp=2, etp=1)
    (stage,) = plan(config, sizes, layout, tokens_per_step=1).stages
    experts = 32 * 3 * 4096 * 1536
    dense = stage.parameters - experts
    assert stage.optimizer == 12 * (dense // 4) + 12 * (experts // 2)


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    sizes = model_sizes(published("qwen3_235b_a22b"), tp=8, etp=8)
    config = config_of(tensor_model_parallel_size=8)
    needed = plan(config, sizes, Layout(8, 1, 1, engine_size=8), tokens_per_step=8192)
    with pytest.raises(ConfigError, match=r"need 5\d\d\.\d GB on a rank of 80 GB; remedy: more expert_model_parallel"):
        check_memory(needed, config, gpu_gigabytes=80)
    with pytest.raises(ConfigError, match=r"train\.micro_batch_tokens: .* remedy: model\.recompute_granularity=full"):
        check_memory(needed, config, gpu_gigabytes=(needed.largest.total - 1) / 1e9)
    config.rollout.gpu_memory_utilization = 0.02
    with pytest.raises(ConfigError, match=r"rollout\.tensor_model_parallel_size: .* remedy: a larger rollout"):
        check_memory(needed, config, gpu_gigabytes=2000)


def test_activations_are_korthikantis() -> None:
    """34 s b h / t bytes of a layer without its scores (arXiv:2205.05198, section 4.2.2), of which 2 s b h are masks of
    dropout, that here is none; of a model as theirs is: as many key-value heads, an MLP of 4 h channels, no gate."""
    hf = {
        "architectures": ["NemotronForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "hidden_act": "relu2",
        "vocab_size": 16,
        "max_position_embeddings": 64,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    }
    config = config_of(tensor_model_parallel_size=4, sequence_parallel=True)
    config.train.micro_batch_tokens = 100
    (stage,) = plan(config, model_sizes(hf, tp=4), Layout(4, 1, 1), tokens_per_step=100).stages
    of_head = 2 * 100 * 64 // 4
    assert stage.activations - of_head == 32 * 100 * 64 // 4


def test_mfu() -> None:
    """3e14 operations in 2 s on 3 GPUs of 100 TFLOP/s each."""
    assert mfu(3e14, 2.0, 3, 100.0) == 0.5
