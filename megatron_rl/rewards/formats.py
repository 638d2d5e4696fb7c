"""Rewards for the right form, whatever the answer: 1.0 or 0.0.

Each form must be there exactly once and in its place, so that it cannot be earned by repeating its marks.
"""

from megatron_rl.rewards.answers import is_number

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
HASH = "####"


def think_format(*, prompt: str, completion: str) -> float:
    """1.0 for '<think>', a thought, '</think>', an answer: each mark once, nothing before them, no part empty.

    Where the prompt ends in '<think>' (some chat templates open the thought themselves), the completion must begin
    inside it. The marks are looked for in the text, so they must not be special tokens, which the text leaves out.
    """
    text = THINK_OPEN + completion if prompt.rstrip().endswith(THINK_OPEN) else completion
    text = text.strip()
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1 or not text.startswith(THINK_OPEN):
        return 0.0
    thought, _, answer = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return float(bool(thought.strip()) and bool(answer.strip()))


def final_answer_format(*, completion: str) -> float:
    """1.0 if the last line is '#### n' with a number n alone, and '####' stands nowhere else."""
    last_line = completion.rstrip().rpartition("\n")[2]
    if completion.count(HASH) != 1 or not last_line.startswith(HASH + " "):
        return 0.0
    return float(is_number(last_line.removeprefix(HASH + " ")))
