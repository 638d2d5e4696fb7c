"""A run folder with made-up numbers that look like those of a real run: what the report's tests read."""

import json
import math
import random
from pathlib import Path
from typing import Any

from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.logs import finite_or_null, write_rollouts

CONFIG = """\
name: {name}
recipe: {recipe}
seed: 1234
model:
  hf_path: models/Qwen2.5-0.5B-Instruct
parallel:
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 2
  sequence_parallel: true
  data_parallel_size: 4
rollout:
  num_prompts_per_step: 64
  num_samples_per_prompt: 8
evaluation:
  num_samples_per_prompt: 4
train:
  num_steps: {num_steps}
  global_batch_size: 512
"""
WORKING = """Let me work through this step by step.

Natalia sold 48 / 2 = 24 clips in May.
In April and May together she sold 48 + 24 = 72 clips.

    total = 48 + 24

#### {answer}"""


def make_rl_run(path: Path, num_steps: int, *, done: int | None = None) -> RunDirectory:
    """An RL run of `num_steps` steps of which `done` (None: all) were made."""
    draw = random.Random(7)
    run = RunDirectory(path)
    run.create()
    run.config_file.write_text(CONFIG.format(name="gsm8k-grpo-qwen2.5-0.5b", recipe="rl", num_steps=num_steps))
    last = num_steps if done is None else done
    rows: list[dict[str, Any]] = [{"step": 0, "eval/heldout/accuracy": 0.214, "eval/heldout/pass_at_k": 0.391}]
    for step in range(1, last + 1):
        rows.append({"step": step} | rl_metrics(draw, step, num_steps))
        if step % max(1, num_steps // 10) == 0:
            learned = 1 - math.exp(-4 * step / num_steps)
            accuracy = 0.214 + 0.38 * learned + draw.gauss(0, 0.008)
            rows.append({"step": step, "eval/heldout/accuracy": accuracy, "eval/heldout/pass_at_k": accuracy + 0.16})
    run.metrics_file.write_text("".join(json.dumps(finite_or_null(row)) + "\n" for row in rows))
    for step in range(1, last + 1, max(1, num_steps // 20)):
        write_rollouts(run, step, [rollout(draw, step, index) for index in range(8)])
    return run


def rl_metrics(draw: random.Random, step: int, num_steps: int) -> dict[str, float]:
    """Metrics of one step: rewards rise, entropy falls, one gradient spikes, one loss is not finite."""
    learned = 1 - math.exp(-4 * step / num_steps)
    reward = 0.2 + 0.5 * learned + draw.gauss(0, 0.03)
    generate, train = 6.0 + draw.gauss(0, 0.4), 4.1 + draw.gauss(0, 0.15)
    phases = {"generate": generate, "score": 0.4, "advantages": 0.02, "log_probs": 1.6, "train": train}
    phases |= {"sync_weights": 0.5 + 0.1 * draw.random()}
    seconds = sum(phases.values()) + 0.3
    spike = 60.0 if step == num_steps // 3 else 1.0
    return {
        "reward/mean": reward,
        "reward/std": 0.45 - 0.1 * learned,
        "reward/min": 0.0,
        "reward/max": 1.1,
        "response/length_mean": 180 + 60 * learned + draw.gauss(0, 6),
        "response/truncated_fraction": max(0.0, 0.12 - 0.1 * learned + draw.gauss(0, 0.01)),
        "policy/loss": math.nan if step == num_steps // 2 else draw.gauss(0, 0.01),
        "policy/entropy": 0.62 - 0.35 * learned + draw.gauss(0, 0.01),
        "policy/kl_ref": 0.03 * learned + abs(draw.gauss(0, 0.001)),
        "policy/approx_kl": abs(draw.gauss(0, 4e-4)),
        "policy/clip_fraction": abs(draw.gauss(0.004, 0.001)),
        "policy/clip_fraction_low": 0.002,
        "policy/clip_fraction_high": 0.002,
        "policy/ratio_max": 1.2 + abs(draw.gauss(0, 0.3)),
        "policy/ratio_min": 0.7,
        "mismatch/log_prob_abs_diff_mean": 10 ** draw.gauss(-3.2, 0.1),
        "mismatch/log_prob_abs_diff_max": 10 ** draw.gauss(-0.9, 0.3),
        "mismatch/token_mult_prob_error": 1.001 + abs(draw.gauss(0, 2e-4)),
        "mismatch/kl": 0.0 if step % 9 == 0 else 10 ** draw.gauss(-5, 0.3),
        "optim/grad_norm": spike * (0.4 + abs(draw.gauss(0, 0.1))),
        "optim/lr": 1e-6 * min(1.0, step / (0.1 * num_steps)),
        "throughput/tokens_per_second": 512 * 300 / seconds,
        "throughput/tokens_per_second_per_gpu": 512 * 300 / seconds / 16,
        "throughput/mfu": 0.31 + draw.gauss(0, 0.01),
        "data/packing_efficiency": 0.93 + draw.gauss(0, 0.01),
        "data/imbalance": 1.04,
        "sync/version": step,
        "sync/bytes": 988_097_536,
        "timing_s/step": seconds,
    } | {f"timing_s/{phase}": value for phase, value in phases.items()}


def rollout(draw: random.Random, step: int, index: int) -> dict[str, Any]:
    """One logged completion; the second of a step is not a correct one."""
    correct = index != 1
    return {
        "step": step,
        "prompt_id": index // 4,
        "source": "train.jsonl:1",
        "prompt": "<|im_start|>user\nNatalia sold clips to 48 of her friends in April, and then she sold half as many "
        "clips in May. How many clips did Natalia sell altogether in April and May?<|im_end|>\n<|im_start|>assistant\n",
        "completion": WORKING.format(answer=72 if correct else 74) + ("" if correct else " <script>alert(1)</script>"),
        "answer": "72",
        "reward": 1.1 if correct else 0.1,
        "reward_terms": {"math": float(correct), "format": 1.0},
        "advantage": draw.gauss(0, 1),
        "finish_reason": "stop" if correct else "length",
        "num_tokens": 80 + index,
        "weight_version": step - 1,
    }


def make_sft_run(path: Path, num_steps: int) -> RunDirectory:
    """An SFT run: loss, learning rate, gradient norm, speed."""
    draw = random.Random(7)
    run = RunDirectory(path)
    run.create()
    run.config_file.write_text(CONFIG.format(name="gsm8k-sft", recipe="sft", num_steps=num_steps))
    rows = [
        {
            "step": step,
            "sft/loss": 1.9 * math.exp(-3 * step / num_steps) + 0.4 + draw.gauss(0, 0.02),
            "optim/grad_norm": 1.0 + draw.gauss(0, 0.1),
            "optim/lr": 1e-5 * (1 - step / num_steps),
            "throughput/tokens_per_second": 15_300 + draw.gauss(0, 200),
        }
        for step in range(1, num_steps + 1)
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run
