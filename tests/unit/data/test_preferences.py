"""Preference data from rows in the common forms, laid out for a policy and for a reward model."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.files import DataError
from megatron_rl.data.preferences import LabelledCompletion, load_labelled, load_pairs, load_preferences
from tests.checkpoints import EOS_TOKEN_ID, make_tokenizer

TOKENIZER = make_tokenizer()
USER = {"role": "user", "content": "2+2?"}


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def rows_file(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load_one(folder: Path, row: dict[str, Any], data: DataConfig | None = None) -> list[LabelledCompletion]:
    (example,) = load_preferences(rows_file(folder, row), data or DataConfig(), TOKENIZER, max_tokens=64)
    return example


def test_a_pair_of_strings(tmp_path: Path) -> None:
    chosen, rejected = load_one(tmp_path, {"prompt": "2+2=", "chosen": "4", "rejected": "22"})
    assert chosen == LabelledCompletion(ids("2+2="), (*ids("4"), EOS_TOKEN_ID))
    assert rejected == LabelledCompletion(ids("2+2="), (*ids("22"), EOS_TOKEN_ID))


@pytest.mark.parametrize("has_prompt", [True, False])
def test_a_pair_of_conversations(has_prompt: bool, tmp_path: Path) -> None:
    """With or without a prompt of their own, the last message is the completion and the rest the prompt."""
    beginning = [] if has_prompt else [USER]
    row = {
        name: [*beginning, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "4"), ("rejected", "5"))
    }
    chosen, rejected = load_one(tmp_path, row | ({"prompt": [USER]} if has_prompt else {}))
    assert chosen.prompt_ids == rejected.prompt_ids == ids("user: 2+2?\nassistant: ")
    assert (chosen.completion_ids, rejected.completion_ids) == ((*ids("4"), EOS_TOKEN_ID), (*ids("5"), EOS_TOKEN_ID))


def test_parquet_and_a_margin(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"prompt": "a", "chosen": "b", "rejected": "c", "by": 1.5}])
    pyarrow.parquet.write_table(table, file)
    ((chosen, _),) = load_pairs(file, DataConfig(format="parquet", margin_key="by"), TOKENIZER, max_tokens=9)
    assert chosen.label == 1.5


@pytest.mark.parametrize(("label", "expected"), [(True, 1.0), (False, 0.0), (-2.5, -2.5)])
def test_a_single_completion_with_a_label(label: Any, expected: float, tmp_path: Path) -> None:
    (completion,) = load_one(tmp_path, {"prompt": "2+2=", "response": "4", "label": label})
    assert completion == LabelledCompletion(ids("2+2="), (*ids("4"), EOS_TOKEN_ID), expected)


def test_steps_end_where_their_last_tokens_are(tmp_path: Path) -> None:
    (completion,) = load_one(tmp_path, {"prompt": "ab", "response": ["xyz", "w"], "label": [True, False]})
    assert completion.completion_ids == (*ids("xyzw"), EOS_TOKEN_ID)
    assert (completion.step_ends, completion.step_labels) == ((2, 3), (1.0, 0.0))
    # Tokens a b x y z w <eos>: read at z and w.
    read = completion.for_reward_model()
    assert read.token_ids.tolist()[:-1] == [*ids("abxyzw"), EOS_TOKEN_ID]
    assert read.loss_mask.tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert read.per_token["label"].tolist() == [0, 0, 0, 0, 1, 0, 0]


def test_the_end_may_be_a_step_of_its_own(tmp_path: Path) -> None:
    (completion,) = load_one(tmp_path, {"prompt": "ab", "response": ["xy", "<eos>"], "label": [True, False]})
    assert completion.completion_ids == (*ids("xy"), EOS_TOKEN_ID)
    assert (completion.step_ends, completion.step_labels) == ((1, 2), (1.0, 0.0))


def test_a_policy_predicts_the_completion_and_a_reward_model_reads_its_end() -> None:
    completion = LabelledCompletion((7, 8), (9, 5, 2), label=0.5)
    predicted, read = completion.for_policy(), completion.for_reward_model()
    assert predicted.token_ids.tolist() == [7, 8, 9, 5, 2]
    assert predicted.loss_mask.tolist() == [0, 1, 1, 1]  # position 1 reads 8 and predicts 9
    assert predicted.per_token["label"].tolist() == [0, 0.5, 0.5, 0.5]
    assert read.token_ids.tolist()[:-1] == [7, 8, 9, 5, 2]
    assert read.loss_mask.tolist() == [0, 0, 0, 0, 1]  # position 4 has read the end-of-sequence token
    assert read.per_token["label"].tolist() == [0, 0, 0, 0, 0.5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "a", "chosen": "b"}, "no key 'rejected'"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' must be text that is not empty, this is empty"),
        ({"chosen": "b", "rejected": "c"}, "without 'prompt'"),
        ({"prompt": "a", "chosen": [USER], "rejected": "c"}, "'chosen' must end in a message of the assistant"),
        ({"prompt": "a", "chosen": "b" * 64, "rejected": "c"}, "66 tokens, at most 64"),
        ({"prompt": "a", "response": "b", "label": "good"}, "'label' must be true, false or a finite number"),
        ({"prompt": "a", "response": ["b"], "label": [True, True]}, "'label' must be a list of 1 labels"),
    ],
)
def test_a_mistake_is_named_by_its_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_one(tmp_path, row)
    assert f"{tmp_path}/rows.jsonl:1: " in str(caught.value)
    assert message in str(caught.value)


def test_a_file_is_of_one_kind(tmp_path: Path) -> None:
    """The first row decides; one of the other kind is a mistake."""
    file = rows_file(
        tmp_path, {"prompt": "a", "response": "b", "label": 1}, {"prompt": "a", "chosen": "b", "rejected": "c"}
    )
    with pytest.raises(DataError, match=r"rows.jsonl:2: no key 'response'"):
        load_labelled(file, DataConfig(), TOKENIZER, max_tokens=64)


_TURNS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2+2?"}],
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hi"}],
    [],
)


@pytest.mark.parametrize("rejected", _TURNS)
@pytest.mark.parametrize("chosen", _TURNS)
@pytest.mark.parametrize("prompt", [None, "Hi", "another", *_TURNS[:3]])
def test_the_prompt_is_what_both_conversations_begin_with(
    prompt: Any, chosen: list[Any], rejected: list[Any], tmp_path: Path
) -> None:
    """Every pair of sources of a prompt: taken where they agree, else refused with the row."""
    answer = {"role": "assistant", "content": "4"}
    row = {"chosen": [*chosen, answer], "rejected": [*rejected, answer | {"content": "5"}]}
    row |= {} if prompt is None else {"prompt": prompt}
    if chosen == rejected and chosen and prompt in (None, "Hi", chosen):
        expected = "".join(f"{m['role']}: {m['content']}\n" for m in chosen) + "assistant: "
    elif chosen == rejected == [] and prompt is not None:  # the completions alone
        expected = prompt if isinstance(prompt, str) else "".join(f"{m['role']}: {m['content']}\n" for m in prompt)
        expected += "" if isinstance(prompt, str) else "assistant: "
    else:
        with pytest.raises(DataError, match=r"\.jsonl:1: "):
            load_one(tmp_path, row)
        return
    first = load_one(tmp_path, row)[0]
    assert make_tokenizer().decode(first.prompt_ids) == expected


@pytest.mark.parametrize("label", [-1, 1.5, 2, "yes", None, float("nan")])
def test_a_steps_label_is_a_probability(label: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: 'label'"):
        load_one(tmp_path, {"prompt": "a", "response": ["b", "c"], "label": [1, label]})
