"""Times one GRPO step and shows where the time goes.

    python -m tools.bench_step [--layout dp2|tp2|pp2|single] [--steps 20]

The step: 16 prompts of 8 tokens x 8 samples x 16 generated tokens, a Qwen3 of 3.2M parameters (4 layers, hidden 256,
vocabulary 64) in float32, one update, weights synced to vLLM. It is the real command line on the ranks of the layout;
the figures are medians over the steps after the first five. Beside them stands a floor: the time that the step's matrix
products alone take at the rate that this machine reaches on the model's largest one, measured in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

LAYOUTS = {
    "single": {},
    "dp2": {"data_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}
WARM_UP = 5
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 768, 4, 4, 2, 64, 64
PROMPT, RESPONSE, SEQUENCES = 8, 16, 128


def one_reward(*, completion: str) -> float:
    """A reward that costs nothing and differs between samples."""
    return float(len(set(completion)))


def make_checkpoint(folder: Path) -> None:
    """3.2M parameters, 64 tokens, no end-of-sequence token: every completion has its full length."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        dtype="float32",
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    disable_progress_bar()
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_config(folder: Path, layout: str, steps: int) -> Path:
    """The run's configuration and its prompts."""
    prompts = [{"prompt": " ".join(f"w{(7 * i + j) % VOCAB}" for j in range(PROMPT))} for i in range(256)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = {
        "name": "bench",
        "output_dir": str(folder / "runs"),
        "model": {"hf_path": str(folder / "model"), "params_dtype": "float32"},
        "parallel": LAYOUTS[layout],
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": PROMPT},
        "rollout": {
            "num_prompts_per_step": 16,
            "num_samples_per_prompt": 8,
            "max_num_seqs": 128,
            "sampling": {"max_response_tokens": RESPONSE},
        },
        "rewards": {"functions": [{"name": "bench_step:one_reward"}]},
        "train": {"num_steps": steps, "micro_batch_tokens": 4096},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"save_interval": 0, "export_hf": False},
        "logging": {"progress": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def matrix_product_floor() -> float:
    """Seconds of the step's matrix products: 2 FLOP per weight and token to generate, 6 to train.

    The rate is that of `hidden x ffn`, the largest product, with as many rows as the step has tokens and all cores.
    """
    attention = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    weights = LAYERS * (attention + 3 * HIDDEN * FFN) + HIDDEN * VOCAB
    flop = 8 * weights * SEQUENCES * (PROMPT + RESPONSE - 1)
    a, b = torch.randn(SEQUENCES * (PROMPT + RESPONSE), HIDDEN), torch.randn(HIDDEN, FFN)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    rate = 2 * a.shape[0] * HIDDEN * FFN / statistics.median(seconds)
    print(f"floor: {flop / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    return flop / rate


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="dp2")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        floor = matrix_product_floor()
        make_checkpoint(folder / "model")
        config = make_config(folder, arguments.layout, arguments.steps)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-m", "megatron_rl", "train", str(config)]
        subprocess.run(command, check=True, env=environment)
        lines = (folder / "runs/bench/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][WARM_UP:]
    median = {key: statistics.median(row[key] for row in rows) for key in rows[-1] if key.startswith("timing_s/")}
    step = median.pop("timing_s/step")
    print(f"layout {arguments.layout}, {len(rows)} steps, {rows[-1]['throughput/tokens']:.0f} tokens per step")
    for key, seconds in sorted(median.items(), key=lambda item: -item[1]):
        share = seconds / step
        print(f"  {key.removeprefix('timing_s/'):14} {seconds:7.3f} s  {share:5.0%}  {'#' * round(40 * share)}")
    print(f"  {'step':14} {step:7.3f} s   fastest {min(row['timing_s/step'] for row in rows):.3f} s")
    print(f"  {'floor':14} {floor:7.3f} s   the step takes {step / floor:.2f} of it")


if __name__ == "__main__":
    main()
