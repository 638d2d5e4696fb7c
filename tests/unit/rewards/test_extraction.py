"""Where an answer is found, whatever it says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rewards.extraction import RULES, extract


@pytest.mark.parametrize(
    ("text", "rule", "found"),
    [
        ("so \\boxed{\\frac{1}{2}} it is", "boxed", "\\frac{1}{2}"),
        ("\\boxed{1}, no: \\boxed{2}", "boxed", "2"),
        ("\\boxed {3}", "boxed", "3"),
        ("\\boxed{\\{1, 2\\}}", "boxed", "\\{1, 2\\}"),
        ("\\boxed{1}, no: \\boxed{2", "boxed", None),
        ("\\boxed{}", "boxed", None),
        ("work\n#### 1,234\nmore", "hash", "1,234"),
        ("<answer>1</answer> <answer> x = 2 </answer>", "answer_tag", "x = 2"),
        ("The answer is $\\frac{3}{4}$. Done.", "phrase", "\\frac{3}{4}"),
        ("**Answer:** 3.5\nThat was it.", "phrase", "3.5"),
        ("The final answer is: **12**.", "phrase", "12"),
        ("the answer is 3. No, the answer is 4", "phrase", "4"),
        ("12 and -3.5 m", "last_number", "-3.5"),
        ("nothing", "last_number", None),
        (" x ", "whole", "x"),
        ("the answer is 3, so \\boxed{4}", "auto", "4"),
        ("\\boxed{4}\n#### 5", "auto", "5"),
        ("no mark, 7", "auto", None),
        ("<think>\\boxed{1}</think> \\boxed{2}", "auto", "2"),
        ("<think>\\boxed{1}</think> nothing", "auto", None),
        ("\\boxed{1}</think> the answer is 2", "auto", "2"),
        ("<think>\\boxed{1}", "auto", None),
    ],
)
def test_extract(text: str, rule: str, found: str | None) -> None:
    assert extract(text, rule) == found


@given(st.text(alphabet="answer is:#{}\\boxd<>/tk $*.1\n", max_size=80), st.sampled_from(RULES))
def test_any_text_has_an_answer_or_none(text: str, rule: str) -> None:
    found = extract(text, rule)
    assert found is None or (found and found == found.strip())
