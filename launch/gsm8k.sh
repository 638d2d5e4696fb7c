#!/usr/bin/env bash
# GSM8K from nothing, on two CPU cores: a tokenizer and a small model, SFT on the training questions' solutions, GRPO on
# the same questions, all test questions before and after. Everything lands in runs/; running it again goes on where it
# stopped.
#   GSM8K_DIR=...   the folder with GSM8K's train.jsonl and test.jsonl; ../shared/data/gsm8k if it is not set
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
data=${GSM8K_DIR:-../shared/data/gsm8k}
recipe=configs/recipes/gsm8k_grpo.yaml
started=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

greedy() { # RUN: greedy answers of its exported checkpoint to all test questions, once, into RUN/greedy.json
  local file=runs/$1/greedy.json
  if [ ! -f "$file" ]; then
    $bin/megatron-rl evaluate $recipe name=gsm8k_greedy model.hf_path="runs/$1/hf" evaluation.temperature=0 >"$file.new"
    mv "$file.new" "$file"
  fi
}

measured() { # METRIC: sampled before and after GRPO, greedy before and after, a line each
  local metric="\"eval/heldout/$1\": *[^,}]*"
  {
    grep -o "$metric" runs/gsm8k_grpo/metrics.jsonl | sed -n '1p;$p'
    grep -ho "$metric" runs/gsm8k_sft/greedy.json runs/gsm8k_grpo/greedy.json
  } | cut -d' ' -f2
}

row() { # TITLE DIGITS: a line of the table, from numbers on standard input
  printf '%-32s' "$1"
  awk -v digits="$2" '{ printf "%10.*f", digits, $1 } END { print "" }'
}

for file in train.jsonl test.jsonl; do
  if [ ! -f "$data/$file" ]; then
    echo "error: GSM8K_DIR: '$data' has no $file; get it from grade_school_math/data of" \
      "https://github.com/openai/grade-school-math" >&2
    exit 2
  fi
done

say "1/4  A BPE tokenizer trained on the training questions, and a random Qwen3-style model"
[ -f runs/gsm8k/test.jsonl ] || $bin/python tools/prepare_gsm8k.py --data "$data" --out runs/gsm8k

say "2/4  Supervised fine-tuning on worked solutions, half of them in the form that GRPO will reward"
$bin/megatron-rl train configs/recipes/gsm8k_sft.yaml

say "3/4  GRPO with answer and format rewards; all test questions before and after"
$bin/megatron-rl train $recipe

say "4/4  The same test questions once more, answered greedily, by both exported checkpoints"
greedy gsm8k_sft
greedy gsm8k_grpo

say "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
printf '%-32s%20s%20s\n' "$(wc -l <runs/gsm8k/test.jsonl) test questions" "sampled" "greedy"
printf '%-32s%10s%10s%10s%10s\n' "" before after before after
measured reward_mean | row "mean reward, of at most 2" 3
measured accuracy | row "  numeric answer right" 3
# The two formats weigh a half each, so what is left of the reward is the mean of their rates.
paste <(measured reward_mean) <(measured accuracy) | awk '{ print $1 - $2 }' | row "  formats kept, mean of both" 3
measured response_length_mean | row "response length, tokens" 1
measured truncated_fraction | row "truncated" 3
echo "report       runs/gsm8k_grpo/report.html"
echo "checkpoint   runs/gsm8k_grpo/hf  (Hugging Face format)"
