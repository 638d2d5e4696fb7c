"""Preference data from files: pairs, single completions with a label or a score, and steps with labels.

    {"prompt": ..., "chosen": ..., "rejected": ...}         a pair; text, or chat messages with the assistant's last.
                                                            Without `prompt` it is what both conversations begin with
    {"prompt": ..., "response": ..., "label": true}         a single completion, good or bad (KTO), or with a number
    {"prompt": ..., "response": [...], "label": [...]}      steps of one completion, each right or wrong; the last may
                                                            be the end-of-sequence token's text

Prompt and completion are tokenised apart and their ids joined, as everywhere, and the completion is ended by the
end-of-sequence token, which is labelled with it. A sequence is laid out in one of two ways: for a policy, position t
predicts token t + 1; for a reward model, position t has read token t.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.chat import render_prompts, tokenize
from megatron_rl.data.files import DataError, Row, read_rows, require
from megatron_rl.data.samples import TrainingSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LabelledCompletion:
    """A completion of a prompt, with its label or the labels of its steps."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """With the end-of-sequence token."""
    label: float = 0.0
    """Of a single completion: 1 for good, 0 for bad, or its score. Of a pair's chosen one: the margin."""
    step_ends: tuple[int, ...] = ()
    """Positions of the last tokens of the steps in `completion_ids`."""
    step_labels: tuple[float, ...] = ()
    """1 for a right step, 0 for a wrong one."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)

    def for_policy(self) -> TrainingSequence:
        """For a policy: trained on the completion's tokens; `label` on all of them."""
        mask = np.zeros(self.num_tokens - 1, dtype=np.float32)
        mask[len(self.prompt_ids) - 1 :] = 1.0
        ids = np.array(self.prompt_ids + self.completion_ids, dtype=np.int64)
        return TrainingSequence(ids, mask, {"label": mask * self.label})

    def for_reward_model(self) -> TrainingSequence:
        """For a reward model: trained at the last token, or at those of the steps, each with its `label`."""
        ids = self.prompt_ids + self.completion_ids
        mask, label = np.zeros(len(ids), dtype=np.float32), np.zeros(len(ids), dtype=np.float32)
        places = [len(self.prompt_ids) + end for end in self.step_ends] or [-1]
        mask[places] = 1.0
        label[places] = self.step_labels or self.label
        # The last token is read too; what it would predict is never looked at.
        return TrainingSequence(np.array([*ids, ids[-1]], dtype=np.int64), mask, {"label": label})


PreferenceExample = list[LabelledCompletion]
"""A pair, the chosen completion first, or a single completion."""


def load_preferences(
    path: str | Path, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int
) -> list[PreferenceExample]:
    """Every row of a file: pairs if its first row has `data.chosen_key`, else single completions.

    Raises:
        DataError: as `load_pairs` and `load_labelled`.
    """
    _, first = next(iter(read_rows(path, data.format)))
    load = load_pairs if data.chosen_key in first else load_labelled
    return load(path, data, tokenizer, max_tokens=max_tokens)


def load_pairs(
    path: str | Path, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int
) -> list[PreferenceExample]:
    """Every row of a file as [chosen, rejected].

    Raises:
        DataError: naming file and line: a missing key, an empty prompt or completion, two that are equal, more than
            max_tokens tokens in all; or a tokenizer without an end-of-sequence token.
    """
    numbered = list(read_rows(path, data.format))
    sources = [source for source, _ in numbered]
    rows = [_pair(row, data, source) for source, row in numbered]
    prompts = [prompt for _, prompt in render_prompts([row[0] for row in rows], sources, data, tokenizer)]
    completions = [_completions([row[side] for row in rows], tokenizer) for side in (1, 2)]
    margins = [_number(row, data.margin_key, source) if data.margin_key else 0.0 for source, row in numbered]
    pairs = []
    for source, prompt, chosen, rejected, margin in zip(sources, prompts, *completions, margins, strict=True):
        if chosen == rejected:
            raise DataError(f"{source}: {data.chosen_key!r} and {data.rejected_key!r} are the same")
        pairs.append([LabelledCompletion(tuple(prompt), chosen, margin), LabelledCompletion(tuple(prompt), rejected)])
        _check_lengths(pairs[-1], source, max_tokens)
    return pairs


def load_labelled(
    path: str | Path, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int
) -> list[PreferenceExample]:
    """Every row of a file as a single completion with its label, or with its steps' labels.

    Raises:
        DataError: as `load_pairs`; a label that is neither true, false nor a number; other numbers of steps and labels.
    """
    numbered = list(read_rows(path, data.format))
    sources = [source for source, _ in numbered]
    prompts = render_prompts(
        [require(row, data.prompt_key, source) for source, row in numbered], sources, data, tokenizer
    )
    examples = []
    for (source, row), (_, prompt_ids) in zip(numbered, prompts, strict=True):
        response = require(row, data.response_key, source)
        make = _with_steps if isinstance(response, list) else _whole
        examples.append([make(tuple(prompt_ids), response, row, data, source, tokenizer)])
        _check_lengths(examples[-1], source, max_tokens)
    return examples


def _whole(
    prompt_ids: tuple[int, ...], response: Any, row: Row, data: DataConfig, source: str, tokenizer: Any
) -> LabelledCompletion:
    text = _text(response, data.response_key, source)
    return LabelledCompletion(prompt_ids, _completions([text], tokenizer)[0], _number(row, data.label_key, source))


def _with_steps(
    prompt_ids: tuple[int, ...], steps: list[Any], row: Row, data: DataConfig, source: str, tokenizer: Any
) -> LabelledCompletion:
    labels = require(row, data.label_key, source)
    if not isinstance(labels, list) or len(labels) != len(steps) or not steps:
        raise DataError(f"{source}: {data.label_key!r} must be a list of {len(steps)} labels, one per step")
    ids = tokenize([_text(step, data.response_key, source) for step in steps], tokenizer)
    ends = np.cumsum([len(of_step) for of_step in ids]) - 1
    joined, eos = tuple(i for of_step in ids for i in of_step), _eos(tokenizer)
    return LabelledCompletion(
        prompt_ids,
        joined if joined[-1:] == (eos,) else (*joined, eos),
        step_ends=tuple(int(end) for end in ends),
        step_labels=tuple(_as_probability(label, data.label_key, source) for label in labels),
    )


def _pair(row: Row, data: DataConfig, source: str) -> tuple[Any, str, str]:
    """(prompt, chosen text, rejected text) of a row."""
    sides = [require(row, key, source) for key in (data.chosen_key, data.rejected_key)]
    texts, beginnings = [], []
    for key, side in zip((data.chosen_key, data.rejected_key), sides, strict=True):
        if isinstance(side, list):
            if not side or not isinstance(side[-1], dict) or side[-1].get("role") != "assistant":
                raise DataError(f"{source}: {key!r} must end in a message of the assistant")
            beginnings.append(side[:-1])
            texts.append(_text(side[-1].get("content"), key, source))
        else:
            beginnings.append([])
            texts.append(_text(side, key, source))
    if data.prompt_key in row:
        return _stated_prompt(row[data.prompt_key], beginnings, data, source), texts[0], texts[1]
    if not beginnings[0] or beginnings[0] != beginnings[1]:
        raise DataError(
            f"{source}: without {data.prompt_key!r}, {data.chosen_key!r} and {data.rejected_key!r} must be "
            "conversations that differ in their last message alone"
        )
    return beginnings[0], texts[0], texts[1]


def _stated_prompt(prompt: Any, beginnings: Sequence[list[Any]], data: DataConfig, source: str) -> Any:
    """The prompt of a row that states one: what both conversations begin with, where they have a beginning.

    The prompt must then be that beginning, or, as text, a message of the user in it. Source: TRL, dataset formats,
    implicit prompts of conversational preference data.
    """
    if beginnings == [[], []]:
        return prompt
    keys = f"{data.chosen_key!r} and {data.rejected_key!r}"
    if beginnings[0] != beginnings[1]:
        raise DataError(f"{source}: the conversations of {keys} differ before their last message")
    asked = [message.get("content") for message in beginnings[0] if isinstance(message, dict)]
    if prompt != beginnings[0] and prompt not in asked:
        raise DataError(f"{source}: {data.prompt_key!r} is not what {keys} begin with; allowed: one of both, or equal")
    return beginnings[0]


def _completions(texts: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Token ids of each text, with one end-of-sequence token at the end."""
    eos = _eos(tokenizer)
    return [tuple(ids) if ids[-1:] == [eos] else (*ids, eos) for ids in tokenize(texts, tokenizer)]


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, which ends a completion")
    return int(tokenizer.eos_token_id)


def _text(value: Any, key: str, source: str) -> str:
    if not isinstance(value, str) or not value:
        what = "empty" if value == "" else type(value).__name__
        raise DataError(f"{source}: {key!r} must be text that is not empty, this is {what}")
    return value


def _number(row: Row, key: str, source: str) -> float:
    return _as_number(require(row, key, source), key, source)


def _as_number(value: Any, key: str, source: str) -> float:
    if not isinstance(value, bool | int | float) or not np.isfinite(value):
        raise DataError(f"{source}: {key!r} must be true, false or a finite number, this is {value!r}")
    return float(value)


def _as_probability(value: Any, key: str, source: str) -> float:
    """A step's label, the target of a cross-entropy."""
    number = _as_number(value, key, source)
    if not 0.0 <= number <= 1.0:
        raise DataError(f"{source}: {key!r} of a step must be true, false or in [0, 1], this is {value!r}")
    return number


def _check_lengths(example: PreferenceExample, source: str, max_tokens: int) -> None:
    for one in example:
        if not one.prompt_ids:
            raise DataError(f"{source}: the prompt has no tokens")
        if one.num_tokens > max_tokens:
            raise DataError(
                f"{source}: prompt and completion have {one.num_tokens} tokens, at most {max_tokens} are allowed"
            )
