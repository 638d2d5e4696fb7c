"""Makes GSM8K ready for a small model of one's own: tokenizer, random checkpoint, SFT and RL files.

    python tools/prepare_gsm8k.py --data DIR --out OUT

    DIR                train.jsonl and test.jsonl of GSM8K: {"question", "answer"}
    OUT/model          a Qwen3 of a few million random parameters; byte-level BPE tokenizer trained on the training file
    OUT/sft.jsonl      {"prompt", "response"}: every training problem twice, once in each of two forms
    OUT/train.jsonl    {"prompt", "answer"}, the same problems once
    OUT/test.jsonl     {"prompt", "answer"}

    marked form        '<think>', the solution, '</think>', a line '#### n'
    prose form         the solution, a line 'The answer is n.'

Both end in the right number, which `numeric_answer` reads in either form. Only the marked one earns `think_format` and
`final_answer_format`: these rewards have something to lift in a model that learns both alike.

The calculator's marks, such as <<48/2=24>>, are left out: the tool that reads them is not there. Numbers are tokenised
digit by digit.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_rl.data.files import DataError, Row, read_rows
from megatron_rl.rewards.formats import HASH, THINK_CLOSE, THINK_OPEN

PAD, EOS = "<pad>", "<eos>"
_CALCULATION = re.compile(r"<<[^<>]*>>")


def prompt_of(row: Row) -> str:
    """The question on a line of its own."""
    return f"{row['prompt'].strip()}\n"


def solution_of(row: Row) -> str:
    """The worked solution, without the calculator's marks and the final answer."""
    return _CALCULATION.sub("", row["response"].rpartition(HASH)[0]).strip()


def marked_response_of(row: Row) -> str:
    """The solution as a thought, and the answer after it: what the rewards ask for."""
    return f"{THINK_OPEN}\n{solution_of(row)}\n{THINK_CLOSE}\n{HASH} {row['answer']}"


def prose_response_of(row: Row) -> str:
    """The solution, and the answer in a sentence."""
    return f"{solution_of(row)}\nThe answer is {row['answer']}."


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text round-trips. The thought's marks are a token each, and stay in decoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # two are added below
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in (THINK_OPEN, THINK_CLOSE)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, hidden_size: int, num_layers: int) -> Qwen3ForCausalLM:
    """A random float32 Qwen3: heads of 32, two key-value heads, tied embeddings, 1,024 positions."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per row."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; created where missing")
    parser.add_argument("--max-rows", type=int, default=None, help="use the first this many rows of each file")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args(arguments)
    if args.hidden_size % 64:
        parser.error(f"--hidden-size: {args.hidden_size} is given, it must be a multiple of 64")
    if args.vocab_size < 512:
        parser.error(f"--vocab-size: {args.vocab_size} is given, it must be at least 512")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the checkpoint and the three files."""
    args = parse(arguments)
    disable_progress_bar()
    try:
        train, test = (
            [row for _, row in read_rows(args.data / name, "gsm8k")][: args.max_rows]
            for name in ("train.jsonl", "test.jsonl")
        )
    except DataError as error:
        sys.exit(f"error: {error}")
    demonstrations = [
        {"prompt": prompt_of(row), "response": response_of(row)}
        for row in train
        for response_of in (marked_response_of, prose_response_of)
    ]
    texts = (text for row in train for text in (prompt_of(row), solution_of(row)))
    tokenizer = train_tokenizer(texts, args.vocab_size)
    model = make_model(tokenizer, seed=args.seed, hidden_size=args.hidden_size, num_layers=args.num_layers)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    write_rows(args.out / "sft.jsonl", demonstrations)
    for name, rows in (("train", train), ("test", test)):
        write_rows(args.out / f"{name}.jsonl", ({"prompt": prompt_of(row), "answer": row["answer"]} for row in rows))
    print(
        f"{args.out}: a Qwen3 of {model.num_parameters():,} parameters, {len(tokenizer)} tokens, "
        f"{len(train)} training and {len(test)} test problems"
    )


if __name__ == "__main__":
    main()
