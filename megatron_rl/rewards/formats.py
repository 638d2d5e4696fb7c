"""Rewards for the right form, whatever the answer: 1.0 or 0.0.

Each form must be there exactly once and in its place, so that it cannot be earned by repeating its marks.
"""

import json
import re
from functools import lru_cache
from typing import Any

from megatron_rl.rewards.answers import is_number
from megatron_rl.rewards.extraction import THINK_CLOSE, THINK_OPEN, after_thought, in_box

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
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


def r1_format(*, prompt: str, completion: str) -> float:
    """1.0 for '<think>', a thought, '</think>', '<answer>', an answer, '</answer>', and nothing else around them.

    The format reward of DeepSeek-R1-Zero (arXiv:2501.12948, section 2.2.2). A prompt that ends in '<think>' opens the
    thought, as in `think_format`.
    """
    if not think_format(prompt=prompt, completion=completion):
        return 0.0
    answer = completion.partition(THINK_CLOSE)[2].strip()
    is_tagged = answer.startswith(ANSWER_OPEN) and answer.endswith(ANSWER_CLOSE)
    once = completion.count(ANSWER_OPEN) == completion.count(ANSWER_CLOSE) == 1
    return float(is_tagged and once and bool(answer[len(ANSWER_OPEN) : -len(ANSWER_CLOSE)].strip()))


def dapo_format(*, completion: str) -> float:
    """1.0 if the last line is 'Answer: ...' with something behind it, as DAPO's prompts ask, and no other line is."""
    lines = [line.strip() for line in completion.strip().splitlines()]
    marked = [line for line in lines if line.lower().startswith("answer:")]
    return float(len(marked) == 1 and marked[0] == lines[-1] and bool(marked[0][len("answer:") :].strip(" *")))


def boxed_format(*, completion: str) -> float:
    r"""1.0 if exactly one \boxed{...} stands after the thought, closed and not empty."""
    text = after_thought(completion)
    marked = in_box(text)
    return float(text.count("\\boxed") == 1 and marked is not None and bool(marked[1].strip()))


def json_schema(*, completion: str, row: dict[str, Any], schema: dict[str, Any] | None = None) -> float:
    """1.0 if the completion is JSON that its schema accepts; one fenced block may hold it.

    Args:
        completion: text of the model.
        row: whose key 'schema', an object or its JSON text, is used where `schema` is not given.
        schema: of all rows.

    Raises:
        ValueError: there is no schema, or it is none.
    """
    validator = _validator(json.dumps(_schema_of(row) if schema is None else schema, sort_keys=True))
    text = after_thought(completion).strip()
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL | re.IGNORECASE)
    try:
        value = json.loads(fenced[1] if fenced else text)
        return float(validator.is_valid(value))
    except (ValueError, RecursionError):
        return 0.0


def _schema_of(row: dict[str, Any]) -> Any:
    schema = row.get("schema")
    if schema is None:
        raise ValueError("no schema: neither in args nor in the row's 'schema'")
    return json.loads(schema) if isinstance(schema, str) else schema


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    loaded = json.loads(schema)
    kind = validator_for(loaded)
    try:
        kind.check_schema(loaded)
    except SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message}") from error
    return kind(loaded)
