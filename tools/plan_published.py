"""What `plan` says of recipes whose speed was published, beside what was published.

    python -m tools.plan_published

Tokens per second and operations per second were published side by side; their ratio is what the publisher counts for a
token, and the plan's operations times the published tokens per second must be the published operations per second.
Layouts were published too; that a run was made on GPUs of so many gigabytes says that it fits there, so what the plan
says of a rank's memory must be below that.

    bridge   NVIDIA Megatron-Bridge, docs/performance-summary.md, 25.11 container, pre-training on DGX-H100, and of
             DeepSeek-V3 on DGX-GB200. Its DeepSeek-V3 also predicts a second token, which `plan` does not train: the
             layer, its projection and the output layer that this takes are added here for the comparison.
    llama3   Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, table 4 and section 1.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.models.sizes import model_sizes
from megatron_rl.placement.layout import layout_of
from megatron_rl.placement.plan import GIGABYTE, plan
from megatron_rl.placement.sizes import ModelSizes, mfu

CONFIGS = Path(__file__).parents[1] / "tests" / "published"
H100_BF16_TFLOPS = 989.0


@dataclass(frozen=True)
class Run:
    """A published run."""

    model: str
    gpus: int
    gigabytes: int
    """Of a GPU's memory."""
    sequence: int
    batch: int
    """Sequences of a step."""
    tokens_per_second: float
    """Of a GPU."""
    tflops: float
    """Operations per second of a GPU, 1e12."""
    parallel: dict[str, Any] = field(default_factory=dict)
    second_token: bool = False
    """The published operations are those of a model that predicts a second token."""


def sizes_of(tensor: int, pipeline: int, context: int, chunks: int | None, expert: int, **more: Any) -> dict[str, Any]:
    """Fields of ParallelConfig."""
    return dict(
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        virtual_pipeline_model_parallel_size=chunks,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1 if expert > 1 else None,
        **more,
    )


# An embedding and an output layer that count as a layer make 126 and 94 layers divisible as published.
COUNTED = dict(account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True)
BRIDGE = (
    Run("llama3_70b", 64, 80, 8192, 128, 1602, 719, sizes_of(4, 8, 1, 5, 1)),
    Run("llama3_405b", 1024, 80, 8192, 512, 292, 737, sizes_of(8, 8, 2, 8, 1, **COUNTED)),
    Run("qwen3_30b_a3b", 16, 80, 4096, 512, 5275, 121, sizes_of(1, 2, 1, 24, 8)),
    Run("qwen3_235b_a22b", 256, 80, 4096, 1024, 1575, 233, sizes_of(2, 8, 1, 4, 32, **COUNTED)),
    # 61 layers are not divisible by 4 stages of 4 chunks, and how they were split is not published.
    Run(
        "deepseek_v3",
        256,
        186,
        4096,
        2048,
        3653,
        949,
        sizes_of(1, 4, 1, None, 64, num_layers_in_first_pipeline_stage=16, num_layers_in_last_pipeline_stage=15),
        second_token=True,
    ),
)
LLAMA3 = (  # (GPUs, context parallel, sequence, published TFLOP/s of a GPU, published MFU in percent)
    (8192, 1, 8192, 430.0, 43),
    (16384, 1, 8192, 400.0, 41),
    (16384, 16, 131072, 380.0, 38),
)
LLAMA3_TOKENS_PER_STEP = 16 * 2**20
LLAMA3_TRAINING = (15.6e12, 3.8e25)
"""Tokens and operations of the whole training of 405B."""


def config_of(model: str, sequence: int, parallel: dict[str, Any]) -> Config:
    """A configuration with full recomputation and rows of one sequence."""
    settings = {
        "name": "published",
        "model": {
            "hf_path": str(CONFIGS / model),
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        "data": {"train": "none"},
        "train": {"micro_batch_tokens": sequence},
        "parallel": parallel,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(settings, file)
        file.flush()
        return load_config(Path(file.name), [])


def second_token_flops(sizes: ModelSizes, hidden: int) -> int:
    """Operations for a token of one more layer, of the projection of two hidden states to one, and of the output."""
    layer = sizes.layers[-1]
    return 6 * (layer.dense_matrices + sizes.topk * layer.expert + 2 * hidden * hidden + sizes.output)


def row_of(run: Run) -> str:
    """One line of the table."""
    hf = json.loads((CONFIGS / run.model / "config.json").read_text())
    config = config_of(run.model, run.sequence, run.parallel)
    layout = layout_of(config, run.gpus)
    tp = layout.tensor_model_parallel_size
    sizes = model_sizes(hf, tp=tp, etp=layout.expert_tensor_parallel_size or tp)
    needed = plan(config, sizes, layout, tokens_per_step=run.batch * run.sequence)
    flops = sizes.training_flops([run.sequence]) / run.sequence
    if run.second_token:
        pairs = 6 * sizes.heads * (sizes.key_channels + sizes.value_channels) * (run.sequence + 1) / 2
        flops += second_token_flops(sizes, hf["hidden_size"]) + pairs
    tflops = flops * run.tokens_per_second / 1e12
    stage = needed.largest
    state = (stage.weights + stage.gradients + stage.optimizer) / GIGABYTE
    shape = f"{run.gpus} = {tp} x {layout.context_parallel_size} x {layout.pipeline_model_parallel_size} x "
    return (
        f"{run.model:16}{sizes.parameters / 1e9:8.1f}  {shape + str(layout.data_parallel_size):22}"
        f"{flops / 1e9:9.1f}{run.tflops:10.0f}{tflops:8.1f}{100 * (tflops / run.tflops - 1):+7.1f} %"
        f"{needed.num_micro_batches:6}{100 * needed.bubble:7.1f} %{state:8.1f}{stage.total / GIGABYTE:8.1f}"
        f"{run.gigabytes:6}"
    )


def llama3_rows() -> list[str]:
    """Llama 3's own table: MFU by the plan's formula beside the published, and what the layout needs."""
    hf = json.loads((CONFIGS / "llama3_405b" / "config.json").read_text())
    rows = []
    for gpus, context, sequence, tflops, published in LLAMA3:
        config = config_of("llama3_405b", sequence, sizes_of(8, 16, context, None, 1, **COUNTED))
        layout = layout_of(config, gpus)
        sizes = model_sizes(hf, tp=8, etp=8)
        needed = plan(config, sizes, layout, tokens_per_step=LLAMA3_TOKENS_PER_STEP)
        per_token = sizes.training_flops([sequence]) / sequence
        used = mfu(tflops * 1e12, 1.0, 1, H100_BF16_TFLOPS)
        rows.append(
            f"{gpus:>6}{sequence:>9}{context:>4}{layout.data_parallel_size:>5}{tflops:>9.0f}{published:>6} %"
            f"{100 * used:>8.1f} %{per_token / 1e9:>9.0f}{needed.num_micro_batches:>6}"
            f"{needed.largest.total / GIGABYTE:>8.1f}"
        )
    tokens, operations = LLAMA3_TRAINING
    sizes = model_sizes(hf)
    counted = sizes.training_flops([8192]) / 8192 * tokens
    rows.append(
        f"the whole training, {tokens / 1e12:.1f} T tokens: published {operations:.1e} operations, plan's "
        f"{counted:.2e}, of which matrices {6 * sizes.active_matrices * tokens:.2e} and the rest attention"
    )
    return rows


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    begin = time.perf_counter()
    print(
        f"{'bridge':16}{'B par.':>8}  {'GPUs = tp x cp x pp x dp':22}{'GFLOP':>7}{'TFLOP/s':>10}{'plan':>8}{'diff':>9}"
        f"{'rows':>6}{'bubble':>9}{'state':>8}{'GB':>8}{'card':>6}"
    )
    for run in BRIDGE:
        print(row_of(run))
    print(
        f"\n{'llama3':>6}{'sequence':>9}{'cp':>4}{'dp':>5}{'TFLOP/s':>9}{'MFU':>8}{'plan':>10}{'GFLOP':>9}{'rows':>6}"
        f"{'GB':>8}"
    )
    print("\n".join(llama3_rows()))
    print(f"\n{time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
