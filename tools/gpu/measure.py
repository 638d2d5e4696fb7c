"""What all stages of the GPU qualification measure with, and the models that they measure.

Times are medians over repetitions after a warm-up, with the device synchronised. The rate that utilisation is measured
against is the one that this GPU reaches on a large bfloat16 product in the same process, not a data sheet's.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Figures = dict[str, Any]

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
