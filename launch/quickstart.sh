#!/usr/bin/env bash
# The quickstart: make a small model and arithmetic, fine-tune it on a careless pupil's answers, and let GRPO repair what
# it learned wrong. Everything lands in runs/; running it again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
started=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
accuracy() { # first or last held-out accuracy in the metrics file
  grep -o '"eval/heldout/accuracy": [0-9.]*' runs/quickstart_grpo/metrics.jsonl | "$1" -n 1 | cut -d' ' -f2
}

say "1/3  A Qwen3-style model, a character tokenizer, and problems such as 47+38="
[ -f runs/arithmetic/heldout.jsonl ] || $bin/python tools/make_arithmetic.py runs/arithmetic

say "2/3  Supervised fine-tuning on answers that often forget the carry (data parallel over 2 ranks)"
$bin/megatron-rl train configs/recipes/quickstart_sft.yaml

say "3/3  GRPO: Megatron-Core policy at tensor parallel 2, vLLM rollouts, weights synced and verified at every step"
$bin/megatron-rl train configs/recipes/quickstart_grpo.yaml

say "Done in $((SECONDS - started)) s"
echo "held-out accuracy  $(accuracy head) after SFT, $(accuracy tail) after GRPO"
echo "report             runs/quickstart_grpo/report.html"
echo "checkpoint         runs/quickstart_grpo/hf  (Hugging Face format)"
echo "curves             $bin/tensorboard --logdir runs"
