"""Prints what a synchronisation of large models moves, by link, and how long that takes at given rates.

    python -m tools.plan_weight_sync [--nvlink 450] [--network 50]

Nothing is run: the plans come from layouts alone (`weights/plan/shard_plan.py`). Rates are in GB/s for one GPU
and one direction; ranks of a node (8) are linked by NVLink, others by the network. Engines have nodes of their own, so
that everything but what an engine copies to itself crosses the network. `gather` is what every engine rank receives
when whole tensors are gathered on every trained rank and sent on whole, `rank 0` what rank 0 sends when it broadcasts
them; both at the network's rate and without any further cost.
"""

import argparse
import time
from collections import Counter
from typing import Any

from megatron_rl.models.families import family_of
from megatron_rl.weights.plan.engine_table import engine_maps, hf_shapes
from megatron_rl.weights.plan.ranks import EngineRanks, TrainedRanks, even_stages
from megatron_rl.weights.plan.shard_plan import ShardPlan

NODE = 8
QWEN3_MOE: dict[str, Any] = dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    num_experts=128,
    num_experts_per_tok=8,
    head_dim=128,
    num_key_value_heads=4,
    vocab_size=151936,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": dict(
        **QWEN3_MOE,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        intermediate_size=6144,
        moe_intermediate_size=768,
    ),
    "Qwen3-235B-A22B": dict(
        **QWEN3_MOE,
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        intermediate_size=12288,
        moe_intermediate_size=1536,
    ),
    "DeepSeek-V3": dict(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        moe_layer_freq=1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=129280,
        n_group=8,
        topk_group=4,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        tie_word_embeddings=False,
    ),
}
"""Sizes from each model's published config.json."""
PLANS = [
    ("Qwen3-30B-A3B", dict(tensor=1, pipeline=2, data=8, expert=8), 2, 8),
    ("Qwen3-30B-A3B", dict(tensor=1, pipeline=2, data=512, expert=8), 2, 8),
    ("Qwen3-235B-A22B", dict(tensor=4, pipeline=8, data=32, expert=16), 16, 8),
    ("DeepSeek-V3", dict(tensor=1, pipeline=16, data=64, expert=16), 8, 32),
]
"""Model, trained layout, engines, and ranks of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s between GPUs of a node")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s of one GPU between nodes")
    arguments = parser.parse_args()
    print(
        f"{'model':16} {'trained':24} {'engines':>10} {'ranks':>10} {'plan s':>7} {'moved GB':>9} "
        f"{'sent max/mean MB':>17} {'got max MB':>11} {'links':>7} {'plan ms':>8} {'gather ms':>10} {'rank 0 ms':>10}"
    )
    for model, sizes, num_engines, tensor in PLANS:
        print(line(model, sizes, num_engines, tensor, arguments.nvlink, arguments.network))


def line(model: str, sizes: dict[str, int], num_engines: int, tensor: int, nvlink: float, network: float) -> str:
    """One plan's row."""
    hf = MODELS[model]
    begun = time.process_time()
    maps = family_of(hf).tensor_maps(hf)
    layers = hf["num_hidden_layers"]
    trained = TrainedRanks(**sizes, stage_of_layer=even_stages(layers, sizes["pipeline"]))
    num_experts = max(tensor_map.num_experts for tensor_map in maps)
    engines = EngineRanks(num_engines, tensor, (0,) * layers, first_rank=trained.world_size, num_experts=num_experts)
    targets = engine_maps(maps, num_key_value_heads=hf["num_key_value_heads"])
    plan = ShardPlan(
        trained.entries(maps, lambda m: "float32" if m.float32 else "bfloat16"),
        engines.entries(targets, lambda m: "bfloat16"),
        bucket_bytes=256 << 20,
    )
    traffic = plan.traffic()
    seconds = time.process_time() - begun
    sent: Counter[int] = Counter()
    got: Counter[int] = Counter()
    for (sender, receiver), num_bytes in traffic.items():
        sent[sender] += num_bytes
        got[receiver] += num_bytes
    slowest = max(busy_ms(traffic, nvlink, network).values())
    whole = 2 * sum(_numel(shape) for shape in hf_shapes(maps).values())
    layout = "x".join(f"{name[:2].upper()}{size}" for name, size in sizes.items() if size > 1)
    world = f"{trained.world_size}+{engines.world_size}"
    mean = sum(sent.values()) / trained.world_size
    return (
        f"{model:16} {layout:24} {f'{num_engines} x TP{tensor}':>10} {world:>10} {seconds:7.1f} "
        f"{sum(traffic.values()) / 1e9:9.0f} {f'{max(sent.values()) / 1e6:.0f}/{mean / 1e6:.0f}':>17} "
        f"{max(got.values()) / 1e6:11.0f} {len(traffic):7} {slowest:8.0f} {whole / network / 1e6:10.0f} "
        f"{whole * num_engines / network / 1e6:10.0f}"
    )


def busy_ms(traffic: Counter[tuple[int, int]], nvlink: float, network: float) -> Counter[tuple[str, int]]:
    """Milliseconds that each rank's sending and receiving take, one after another, at the rates of its links."""
    busy: Counter[tuple[str, int]] = Counter()
    for (sender, receiver), num_bytes in traffic.items():
        if sender != receiver:
            rate = nvlink if sender // NODE == receiver // NODE else network
            busy["out", sender] += num_bytes / rate / 1e6  # type: ignore[assignment]
            busy["in", receiver] += num_bytes / rate / 1e6  # type: ignore[assignment]
    return busy


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


if __name__ == "__main__":
    main()
