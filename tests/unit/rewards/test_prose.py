"""Length, language, repetition."""

import pytest

from megatron_rl.rewards.prose import language, length, repetition


@pytest.mark.parametrize(
    ("unit", "count"),
    [("words", 5), ("sentences", 2), ("paragraphs", 2), ("characters", len("It's 3.5 m.\n\nReally, yes!"))],
)
def test_length_counts_units(unit: str, count: int) -> None:
    text = "It's 3.5 m.\n\nReally, yes!"
    count = count + 1 if unit == "words" else count  # 3 and 5 are words of their own
    assert length(completion=text, at_least=count, at_most=count, unit=unit) == 1.0
    assert length(completion=text, at_least=count + 1, unit=unit) == 0.0
    assert length(completion=text, at_most=count - 1, unit=unit) == 0.0


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    assert repetition(completion="a b c d e f", n=2) == 0.0
    assert repetition(completion="a b a b a b", n=2) == -3 / 5
    assert repetition(completion="loop " * 100, n=4) == -96 / 97
    assert repetition(completion="\u5475" * 100, n=4) == -96 / 97
    assert repetition(completion="") == 0.0


def test_language() -> None:
    assert language(completion="This is a short sentence.", code="en") == 1.0
    assert language(completion="\u8fd9\u662f\u4e00\u4e2a\u6d4b\u8bd5", code="en") == 0.0
    assert language(completion="12 + 3 = 15", code="en") == 0.0
