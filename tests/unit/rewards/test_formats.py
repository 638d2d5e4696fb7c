"""Forms, and attempts to earn them without having them."""

import pytest

from megatron_rl.rewards.answers import final_answer_format, think_format


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
