#!/usr/bin/env bash
# What quantisation-aware GRPO costs on the quickstart: held-out accuracy of the same recipe with and without FP8.
# Needs the quickstart's SFT checkpoint (made here where it is missing). Fails if FP8 is worse by more than 0.03.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
accuracy() { grep -o '"eval/heldout/accuracy": [0-9.]*' "runs/$1/metrics.jsonl" | tail -n 1 | cut -d' ' -f2; }

[ -f runs/arithmetic/heldout.jsonl ] || $python tools/make_arithmetic.py runs/arithmetic
[ -d runs/quickstart_sft/hf ] || $python -m megatron_rl train configs/recipes/quickstart_sft.yaml
$python -m megatron_rl train configs/recipes/quickstart_grpo.yaml
$python -m megatron_rl train configs/recipes/quickstart_grpo_fp8.yaml
plain=$(accuracy quickstart_grpo) fp8=$(accuracy quickstart_grpo_fp8)
echo "held-out accuracy  $plain unquantised, $fp8 quantisation-aware fp8"
awk -v a="$plain" -v b="$fp8" 'BEGIN { exit !(b >= a - 0.03) }'
