"""Forms, and attempts to earn them without having them."""

import json

import pytest

from megatron_rl.rewards.formats import (
    boxed_format,
    dapo_format,
    final_answer_format,
    json_schema,
    r1_format,
    think_format,
)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q", "<think>2+2</think>4", 1.0),
        ("Q", " <think>\n2+2\n</think>\n4\n", 1.0),
        ("Q", "<think>2+2</think>", 0.0),
        ("Q", "<think>2+2</think> \n", 0.0),
        ("Q", "<think> </think>4", 0.0),
        ("Q", "<think>2+2 4", 0.0),
        ("Q", "2+2</think>4", 0.0),
        ("Q", "well <think>2+2</think>4", 0.0),
        ("Q", "</think>2<think>4", 0.0),
        ("Q", "<think>a</think>4<think>b</think>5", 0.0),
        ("Q", "<think><think>a</think>4", 0.0),
        ("Q", "<think>a</think></think>4", 0.0),
        ("Q", "<THINK>a</THINK>4", 0.0),
        ("Q", "", 0.0),
        # The prompt has opened the thought: the completion closes it, and does not open another.
        ("Q\n<think>\n", "2+2</think>4", 1.0),
        ("Q\n<think>\n", "<think>2+2</think>4", 0.0),
        ("Q about <think> tags", "2+2</think>4", 0.0),
    ],
)
def test_think_format(prompt: str, completion: str, expected: float) -> None:
    assert think_format(prompt=prompt, completion=completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so\n#### 72", 1.0),
        ("#### 72", 1.0),
        ("<think>a</think>\n#### -1,234.5\n\n", 1.0),
        ("so #### 72", 0.0),
        ("####72", 0.0),
        ("####  72", 0.0),
        ("##### 72", 0.0),
        ("#### 72 apples", 0.0),
        ("#### $72", 0.0),
        ("#### 72.", 0.0),
        ("#### 72\ndone", 0.0),
        ("#### 71\n#### 72", 0.0),
        ("####", 0.0),
        ("#### many", 0.0),
        ("72", 0.0),
        ("", 0.0),
    ],
)
def test_final_answer_format(completion: str, expected: float) -> None:
    assert final_answer_format(completion=completion) == expected


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q", "<think>2+2</think>\n<answer>4</answer>", 1.0),
        ("Q<think>", "2+2</think> <answer> 4 </answer>\n", 1.0),
        ("Q", "<think>2+2</think> so <answer>4</answer>", 0.0),
        ("Q", "<think>2+2</think><answer>4</answer><answer>5</answer>", 0.0),
        ("Q", "<think>2+2</think><answer> </answer>", 0.0),
        ("Q", "<answer>4</answer>", 0.0),
        ("Q", "<think><answer>4</answer></think> 4", 0.0),
    ],
)
def test_r1_format(prompt: str, completion: str, expected: float) -> None:
    assert r1_format(prompt=prompt, completion=completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("2 + 2\nAnswer: 4", 1.0),
        ("Answer: 4\n", 1.0),
        ("Answer:", 0.0),
        ("Answer: 4\nthat is it", 0.0),
        ("Answer: 3\nAnswer: 4", 0.0),
        ("4", 0.0),
    ],
)
def test_dapo_format(completion: str, expected: float) -> None:
    assert dapo_format(completion=completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so \\boxed{4}", 1.0),
        ("<think>\\boxed{3}</think>\\boxed{4}", 1.0),
        ("\\boxed{3} \\boxed{4}", 0.0),
        ("\\boxed{}", 0.0),
        ("\\boxed{4", 0.0),
        ("4", 0.0),
    ],
)
def test_boxed_format(completion: str, expected: float) -> None:
    assert boxed_format(completion=completion) == expected


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"n": 4}', 1.0),
        ('<think>hm</think>```json\n{"n": 4}\n```', 1.0),
        ('{"n": "4"}', 0.0),
        ('It is {"n": 4}', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_schema(completion: str, expected: float) -> None:
    assert json_schema(completion=completion, row={}, schema=SCHEMA) == expected
    assert json_schema(completion=completion, row={"schema": json.dumps(SCHEMA)}) == expected


def test_a_schema_that_is_none() -> None:
    with pytest.raises(ValueError, match="no schema"):
        json_schema(completion="{}", row={})
    with pytest.raises(ValueError, match="no JSON schema: 'number of' is not valid"):
        json_schema(completion="{}", row={}, schema={"type": "number of"})
