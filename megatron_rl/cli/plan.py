"""`megatron-rl plan CONFIG [key=value ...]`: what a configuration needs, for any number of ranks and without GPUs.

Reads config.json and nothing else of the model; no process group, no torch.distributed. What cannot divide or fit is
refused with what would help.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron_rl.config.hf_checkpoint import read_json_object, read_model_shape
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config, Recipe
from megatron_rl.config.validate import check_model, check_values
from megatron_rl.config.world import layers_of_stages, longest_sequence
from megatron_rl.placement.layout import Layout, layout_of
from megatron_rl.placement.plan import GIGABYTE, Plan, check_memory, plan
from megatron_rl.placement.sizes import ModelSizes


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, operations and pipeline bubble of a layout, without GPUs",
        description="Print what a configuration needs on each rank; refuse what cannot divide or fit.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, for example configs/recipes/*.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="for example train.num_steps=10")
    parser.add_argument("--ranks", type=int, help="number of training ranks; default: what the layout says")
    parser.add_argument("--gpu-gigabytes", type=float, help="memory of a GPU, 1e9 bytes; refuses what does not fit")
    parser.add_argument("--tokens-per-sample", type=int, help="mean length; default: the longest allowed")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from megatron_rl.models.sizes import model_sizes

    config = load_config(arguments.config, arguments.overrides)
    generates = config.recipe is Recipe.rl
    check_values(config, world_size=arguments.ranks, generates=generates)
    folder = Path(config.model.hf_path)
    check_model(config, read_model_shape(folder), generates=generates)
    layout = layout_of(config, arguments.ranks)
    tp = layout.tensor_model_parallel_size
    hf = read_json_object(folder / "config.json", "model.hf_path")
    sizes = model_sizes(hf, tp=tp, etp=layout.expert_tensor_parallel_size or tp)
    length = arguments.tokens_per_sample or longest_sequence(config)
    samples = config.train.global_batch_size or (
        config.rollout.num_prompts_per_step * config.rollout.num_samples_per_prompt
    )
    needed = plan(config, sizes, layout, tokens_per_step=samples * length)
    if arguments.gpu_gigabytes is not None:
        check_memory(needed, config, gpu_gigabytes=arguments.gpu_gigabytes)
    print("\n".join(_lines(config, needed, samples, length, generates)))
    return 0


def _lines(config: Config, needed: Plan, samples: int, length: int, generates: bool) -> list[str]:
    layout, sizes, step = needed.layout, needed.sizes, samples * length
    flops = sizes.training_flops([length])
    lines = [
        f"{'model':12}{sizes.parameters / 1e9:.2f} B parameters, {_active(sizes) / 1e9:.2f} B active for a token",
        f"{'layout':12}{_layout(layout)}",
        f"{'layers':12}{_stages(config, sizes)}",
        f"{'step':12}{samples} samples of {length} tokens; {needed.num_micro_batches} micro-batches of at most "
        f"{config.train.micro_batch_tokens} tokens on each replica; pipeline bubble {100 * needed.bubble:.1f} %",
        f"{'operations':12}{flops / length / 1e9:.1f} GFLOP per token, {flops * samples / 1e15:.2f} PFLOP per update, "
        f"{flops * samples / layout.world_size / 1e12:.1f} TFLOP per rank ({step} tokens)",
        f"{'GB per rank':12}{'parameters':>12}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}"
        f"{'sum':>9}",
    ]
    for number, stage in enumerate(needed.stages):
        if number and number < len(needed.stages) - 1 and stage == needed.stages[number - 1]:
            continue
        columns = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total)
        numbers = "".join(f"{x / GIGABYTE:>{width}.2f}" for x, width in zip(columns, (10, 11, 11, 13, 9), strict=True))
        lines.append(f"{f'stage {number}':12}{stage.parameters / 1e6:>11.1f}M{numbers}")
    if generates:
        per_sequence = longest_sequence(config) * needed.cache_bytes_per_token / GIGABYTE
        lines.append(
            f"{'engines':12}{layout.num_engines} of {layout.engine_size} ranks: {needed.engine_weights / GIGABYTE:.2f} "
            f"GB of weights, {needed.cache_bytes_per_token / 1e3:.1f} kB of cache per token, "
            f"{per_sequence:.3f} GB for the longest sequence"
        )
    return lines


def _active(sizes: ModelSizes) -> int:
    """Parameters that a token meets, the embedding and what is not a matrix among them."""
    routed = sum(layer.dense + sizes.topk * layer.expert for layer in sizes.layers)
    return routed + sizes.embedding + sizes.final_norm + sizes.output


def _layout(layout: Layout) -> str:
    expert_tensor = layout.expert_tensor_parallel_size or layout.tensor_model_parallel_size
    parts = (
        ("tensor", layout.tensor_model_parallel_size),
        ("context", layout.context_parallel_size),
        ("pipeline", layout.pipeline_model_parallel_size),
        ("data", layout.data_parallel_size),
    )
    text = f"{layout.world_size} ranks = " + " x ".join(f"{name} {size}" for name, size in parts)
    if layout.expert_model_parallel_size > 1:
        text += (
            f"; experts: tensor {expert_tensor} x expert {layout.expert_model_parallel_size} x "
            f"data {layout.expert_data_parallel_size} on each stage"
        )
    return text


def _stages(config: Config, sizes: ModelSizes) -> str:
    stages = layers_of_stages(config.parallel, len(sizes.layers))
    return ", ".join("+".join(map(str, chunks)) for chunks in stages) + (" by stage" if len(stages) > 1 else "")
