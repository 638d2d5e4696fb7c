"""Makes the quickstart's material: a small random checkpoint and generated arithmetic, in a few seconds.

    python tools/make_arithmetic.py OUT

    OUT/model          a Qwen3 checkpoint in Hugging Face's format, with a tokenizer of one token per character
    OUT/sft.jsonl      {"prompt": "12+7=", "response": "19"}
    OUT/train.jsonl    {"prompt": "12+7=", "answer": "19"}
    OUT/heldout.jsonl  as train.jsonl

No problem stands in two files, nor twice in one: what the held-out problems measure was never trained on. Everything
is a function of the arguments; equal ones give equal files.

The SFT responses come from a pupil who forgets the carry in a part of the problems (--slip-rate): 47+38=75. A model
trained on them knows how to calculate, and mostly slips where a carry is due. That is what RL repairs within minutes.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-= "
VOCABULARY = (PAD, EOS, UNKNOWN, *CHARACTERS)
"""17 tokens: a prime, so that no tensor-parallel size divides it and the vocabulary is padded as a real one is."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and nothing between tokens when decoded."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def make_model(
    *, seed: int, hidden_size: int, num_layers: int, num_heads: int, num_key_value_heads: int, intermediate_size: int
) -> Qwen3ForCausalLM:
    """A Qwen3 with random float32 weights and tied embeddings; head_dim is hidden_size / num_heads."""
    ids = {"pad_token_id": VOCABULARY.index(PAD), "bos_token_id": None, "eos_token_id": VOCABULARY.index(EOS)}
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=128,
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


@dataclass(frozen=True)
class Problem:
    """Two operands >= 0 and '+' or '-'; the result may be negative."""

    left: int
    operator: str
    right: int

    @property
    def prompt(self) -> str:
        """'12+7='."""
        return f"{self.left}{self.operator}{self.right}="

    @property
    def answer(self) -> str:
        """The result."""
        return str(self.left + self.right if self.operator == "+" else self.left - self.right)

    @property
    def slip(self) -> str:
        """The result of adding or subtracting digit by digit without carry; often the right one."""
        if self.operator == "-" and self.left < self.right:
            return f"-{Problem(self.right, '-', self.left).slip}"
        sign = 1 if self.operator == "+" else -1
        digits = zip_longest(str(self.left)[::-1], str(self.right)[::-1], fillvalue="0")
        return str(sum((int(a) + sign * int(b)) % 10 * 10**place for place, (a, b) in enumerate(digits)))


def make_problems(operators: str, max_operand: int, seed: int) -> list[Problem]:
    """Every problem of operands in [0, max_operand], in random order."""
    operands = range(max_operand + 1)
    problems = [Problem(left, operator, right) for operator, left, right in product(operators, operands, operands)]
    random.Random(seed).shuffle(problems)
    return problems


def write_answers(path: Path, problems: Sequence[Problem]) -> None:
    """One {"prompt", "answer"} per problem."""
    write_rows(path, ({"prompt": problem.prompt, "answer": problem.answer} for problem in problems))


def write_demonstrations(path: Path, problems: Sequence[Problem], slip_rate: float, seed: int) -> None:
    """One {"prompt", "response"} per problem, the carry forgotten with probability `slip_rate`."""
    draw = random.Random(seed)
    rows = ((p.prompt, p.slip if draw.random() < slip_rate else p.answer) for p in problems)
    write_rows(path, ({"prompt": prompt, "response": response} for prompt, response in rows))


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object per row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; created where missing")
    parser.add_argument("--seed", type=int, default=0, help="of weights and problems")
    parser.add_argument("--operators", default="+", help="+, - or both")
    parser.add_argument("--max-operand", type=int, default=99)
    parser.add_argument("--slip-rate", type=float, default=0.65, help="part of the SFT rows that forget the carry")
    parser.add_argument("--num-sft", type=int, default=4500)
    parser.add_argument("--num-train", type=int, default=5000)
    parser.add_argument("--num-heldout", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-key-value-heads", type=int, default=2)
    parser.add_argument("--intermediate-size", type=int, default=384)
    args = parser.parse_args(arguments)
    if args.operators not in ("+", "-", "+-"):
        parser.error(f"--operators: {args.operators!r} is given, allowed are +, - and +-")
    if not 0 <= args.slip_rate <= 1:
        parser.error(f"--slip-rate: {args.slip_rate} is given, it must be in [0, 1]")
    if args.hidden_size % args.num_heads or args.num_heads % args.num_key_value_heads:
        parser.error("--hidden-size must be a multiple of --num-heads, and that one of --num-key-value-heads")
    asked = args.num_sft + args.num_train + args.num_heldout
    there = len(args.operators) * (args.max_operand + 1) ** 2
    if asked > there:
        parser.error(f"{asked} problems are asked for; {args.operators!r} up to {args.max_operand} makes only {there}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the checkpoint and the three files."""
    args = parse(arguments)
    model = make_model(
        seed=args.seed,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        num_key_value_heads=args.num_key_value_heads,
        intermediate_size=args.intermediate_size,
    )
    disable_progress_bar()
    model.save_pretrained(args.out / "model")
    make_tokenizer().save_pretrained(args.out / "model")
    problems = make_problems(args.operators, args.max_operand, args.seed)
    heldout, rest = problems[: args.num_heldout], problems[args.num_heldout :]
    write_answers(args.out / "heldout.jsonl", heldout)
    write_demonstrations(args.out / "sft.jsonl", rest[: args.num_sft], args.slip_rate, args.seed)
    write_answers(args.out / "train.jsonl", rest[args.num_sft :][: args.num_train])
    print(
        f"{args.out}: a Qwen3 of {model.num_parameters():,} parameters, {args.num_sft} SFT rows, "
        f"{args.num_train} training prompts, {args.num_heldout} held-out prompts"
    )


if __name__ == "__main__":
    main()
