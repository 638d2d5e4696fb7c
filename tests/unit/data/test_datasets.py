"""Prompts and training sequences, with token ids written down from the bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.datasets import load_prompts, load_sft, training_sequence
from megatron_rl.data.files import DataError
from megatron_rl.data.samples import Completion, Prompt, Sample
from tests.checkpoints import EOS_TOKEN_ID, make_tokenizer

A, B, C = make_tokenizer()("abc")["input_ids"]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_load_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "answer": "7", "level": 2}, {"prompt": "c", "answer": 7}, {"prompt": "a"}]
    path = write(tmp_path, *rows)
    first, second, third = load_prompts(path, DataConfig(), make_tokenizer(), max_prompt_tokens=2)
    assert first == Prompt(0, (A, B), "ab", "7", f"{path}:1", rows[0])
    assert (second.prompt_id, second.answer, third.answer) == (1, "7", None)
    assert third.source == f"{path}:3"


def test_load_prompts_reads_the_configured_keys_and_format(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "a", "answer": "so 1+1 = 2\n#### 2"})
    (prompt,) = load_prompts(path, DataConfig(format="gsm8k"), make_tokenizer(), max_prompt_tokens=1)
    assert (prompt.text, prompt.answer) == ("a", "2")
    config = DataConfig(prompt_key="question", answer_key="gold")
    (prompt,) = load_prompts(
        write(tmp_path, {"question": "b", "gold": 1.5}), config, make_tokenizer(), max_prompt_tokens=1
    )
    assert (prompt.text, prompt.answer) == ("b", "1.5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "abc"}, ":2: the prompt has 3 tokens, data.max_prompt_tokens is 2"),
        ({"prompt": ""}, ":2: the prompt is empty"),
        ({"question": "a"}, ":2: no key 'prompt'; the row has 'question'"),
        ({"prompt": "a", "answer": [1]}, ":2: 'answer' must be a string or a number, this is list"),
        ({"prompt": "a", "answer": True}, ":2: 'answer' must be a string or a number, this is bool"),
    ],
)
def test_load_prompts_names_the_bad_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        load_prompts(write(tmp_path, {"prompt": "a"}, row), DataConfig(), make_tokenizer(), max_prompt_tokens=2)
    assert message in str(error.value)


def test_load_sft_trains_response_and_eos_only(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "ab", "response": "cc"}, {"prompt": "c", "response": "a<eos>"})
    first, second = load_sft(path, DataConfig(), make_tokenizer(), max_tokens=5)
    assert first.token_ids.tolist() == [A, B, C, C, EOS_TOKEN_ID]
    # Labels are b c c eos: the prompt's own b is not trained on.
    assert first.loss_mask.tolist() == [0, 1, 1, 1]
    # The written-out end of sequence is the token itself, and none is added.
    assert second.token_ids.tolist() == [C, A, EOS_TOKEN_ID]
    assert second.loss_mask.tolist() == [1, 1]
    assert (first.token_ids.dtype, first.loss_mask.dtype) == (np.int64, np.float32)


def test_load_sft_with_a_chat_prompt_continues_the_assistants_turn(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = write(tmp_path, {"prompt": [{"role": "user", "content": "a"}], "response": "b"})
    (sequence,) = load_sft(path, DataConfig(), tokenizer, max_tokens=99)
    assert tokenizer.decode(sequence.token_ids) == "user: a\nassistant: b<eos>"
    assert sequence.loss_mask.sum() == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "ab", "response": "cc"}, ":1: prompt and response have 2 + 3 = 5 tokens, at most 4 are allowed"),
        ({"prompt": "ab", "response": ""}, ":1: 'response' must be a string that is not empty, this is empty"),
        ({"prompt": "ab", "response": 3}, ":1: 'response' must be a string that is not empty, this is int"),
        ({"prompt": "ab"}, ":1: no key 'response'; the row has 'prompt'"),
    ],
)
def test_load_sft_names_the_bad_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        load_sft(write(tmp_path, row), DataConfig(), make_tokenizer(), max_tokens=4)
    assert message in str(error.value)


def test_load_sft_needs_an_end_of_sequence_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_sft(write(tmp_path, {"prompt": "a", "response": "b"}), DataConfig(), tokenizer, max_tokens=9)


def sample(prompt_ids: tuple[int, ...], ids: tuple[int, ...], log_probs: tuple[float, ...]) -> Sample:
    prompt = Prompt(0, prompt_ids, "", None, "f:1")
    return Sample(prompt, Completion(ids, log_probs, "", "stop", 0), 1.0, {})


def test_training_sequence_aligns_completion_values_with_the_predicted_token() -> None:
    sequence = training_sequence(sample((A, B, C), (B, EOS_TOKEN_ID), (-0.5, -0.25)))
    assert sequence.token_ids.tolist() == [A, B, C, B, EOS_TOKEN_ID]
    # Labels are b c b eos; the last two are the completion.
    assert sequence.loss_mask.tolist() == [0, 0, 1, 1]
    assert sequence.per_token["rollout_log_probs"].tolist() == [0, 0, -0.5, -0.25]
    assert {values.dtype for values in sequence.per_token.values()} == {np.dtype(np.float32)}


def test_training_sequence_of_a_prompt_of_one_token_has_loss_everywhere() -> None:
    assert training_sequence(sample((A,), (B,), (-1.0,))).loss_mask.tolist() == [1]


def test_training_sequence_refuses_log_probs_of_another_length() -> None:
    with pytest.raises(AssertionError, match="one log-prob per token"):
        training_sequence(sample((A,), (B, C), (-1.0,)))
