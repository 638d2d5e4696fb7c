"""Packing and balancing on real lengths, and a training step on micro-batches against padded ones.

    python -m tools.bench_packing GSM8K.jsonl [--batch 1024] [--micro-batch-tokens 8192] [--no-step]

Lengths are those of GSM8K's questions and answers under a tokenizer of byte pairs trained on the file itself, so no
download is needed. For 8 and 64 data-parallel ranks: packing efficiency and imbalance of tokens, and the lowest
imbalance that the data allow. A step is forward and backward of a small Qwen3 on this machine's CPU, once over packed
micro-batches and once over the same sequences, each filled up to the longest of the batch, as padding does.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_rl.data.packing import imbalance, packing_efficiency, plan_micro_batches


def lengths_of(file: Path) -> list[int]:
    """Tokens of each question with its answer."""
    texts = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, file.read_text().splitlines())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8192, show_progress=False))
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]


def lower_bound(lengths: list[int], num_ranks: int) -> float:
    """Imbalance that no layout can go below: the longest sequence alone, or whole tokens."""
    mean = sum(lengths) / num_ranks
    return max(max(lengths), -(-sum(lengths) // num_ranks)) / mean - 1.0


def report_packing(lengths: list[int], micro_batch_tokens: int, batch: int) -> None:
    """Means and extremes over all batches of the file."""
    print(f"{'ranks':>6}{'efficiency':>12}{'lowest':>9}{'imbalance':>11}{'highest':>9}{'bound':>9}{'ms':>7}")
    for num_ranks in (8, 64):
        found = []
        for start in range(0, len(lengths) - batch + 1, batch):
            part = lengths[start : start + batch]
            # Micro-batches of several sequences: with 64 ranks a rank has fewer tokens than a full micro-batch.
            micro_batches = min(micro_batch_tokens, sum(part) // num_ranks + max(part))
            begin = time.perf_counter()
            plan = plan_micro_batches(part, num_ranks=num_ranks, micro_batch_tokens=micro_batches)
            seconds = time.perf_counter() - begin
            found.append((packing_efficiency(plan, part), imbalance(plan, part), lower_bound(part, num_ranks), seconds))
        efficiency, imbalanced, bound, seconds_each = zip(*found, strict=True)
        print(
            f"{num_ranks:>6}{sum(efficiency) / len(found):>12.4f}{min(efficiency):>9.4f}"
            f"{sum(imbalanced) / len(found):>11.4f}{max(imbalanced):>9.4f}{sum(bound) / len(found):>9.4f}"
            f"{1000 * sum(seconds_each) / len(found):>7.1f}"
        )


def report_step(lengths: list[int], micro_batch_tokens: int) -> None:
    """Samples per second of forward and backward, packed and padded."""
    import os

    import numpy as np
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
    from megatron_rl.config.schema import AlgorithmConfig, Dtype, ModelConfig, ParallelConfig
    from megatron_rl.data.samples import TrainingSequence
    from megatron_rl.engine.initialize import finalize, initialize
    from megatron_rl.engine.policy import Policy
    from megatron_rl.engine.step import forward_backward
    from megatron_rl.objectives.minibatch import MiniBatch
    from megatron_rl.objectives.objectives import SupervisedObjective

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)
        parallel = ParallelConfig()
        groups = initialize(parallel, seed=1)
        policy = Policy(ModelConfig(hf_path=folder, params_dtype=Dtype.float32), groups, parallel)
        rng = np.random.default_rng(0)

        def seconds(sizes: list[int], tokens: int) -> float:
            sequences = [TrainingSequence(rng.integers(0, 8192, n + 1), np.ones(n, dtype=np.float32)) for n in sizes]
            batch = MiniBatch.of(sequences, range(len(sizes)), groups, micro_batch_tokens=tokens, pad_to_multiple=1)
            objective = SupervisedObjective(AlgorithmConfig(), batch.counts, token_sum_norm=1.0)
            begin = time.perf_counter()
            forward_backward(policy, batch.micro_batches, objective)
            return time.perf_counter() - begin

        longest = max(lengths)
        seconds(lengths[:4], micro_batch_tokens)  # warm up
        ratios = []
        for _ in range(3):
            packed = seconds(lengths, micro_batch_tokens)
            padded = seconds([longest] * len(lengths), micro_batch_tokens)
            ratios.append((padded / packed, len(lengths) / packed, len(lengths) / padded))
        ratio, fast, slow = sorted(ratios)[1]
        print(
            f"step of {len(lengths)} samples, mean {sum(lengths) / len(lengths):.0f} and longest {longest} tokens: "
            f"{fast:.1f} samples/s packed, {slow:.1f} padded to the longest, {ratio:.2f} times as many"
        )
        finalize()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="GSM8K's training file, JSONL")
    parser.add_argument("--batch", type=int, default=1024, help="samples of an optimizer step")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--no-step", action="store_true", help="only the packing")
    arguments = parser.parse_args()
    lengths = lengths_of(arguments.file)
    print(
        f"{len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens, mean {sum(lengths) / len(lengths):.1f}; "
        f"batches of {arguments.batch}"
    )
    report_packing(lengths, arguments.micro_batch_tokens, arguments.batch)
    if not arguments.no_step:
        random.Random(0).shuffle(lengths)
        report_step(lengths[:96], 2048)


if __name__ == "__main__":
    main()
