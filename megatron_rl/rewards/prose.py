"""Rewards for how a text is written: its length, its language, how much it repeats itself."""

import re
from collections import Counter
from functools import cache
from typing import Any

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def words(text: str) -> list[str]:
    """Runs of letters and digits, with the hyphens and apostrophes within."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """What ends in a full stop, question or exclamation mark, and a last part without one; 3.5 ends none."""
    marked = re.sub(r"(?<=\d)\.(?=\d)", "\u2024", text)
    return [
        part.strip()
        for part in re.split(r"(?<=[.!?])[\"')]*\s+|(?<=[\u3002\uff01\uff1f])|\n+", marked)
        if _WORD.search(part)
    ]


def paragraphs(text: str) -> list[str]:
    """Parts between empty lines."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def length(*, completion: str, at_least: int = 0, at_most: int | None = None, unit: str = "words") -> float:
    """1 if the completion has from `at_least` to `at_most` words, sentences, paragraphs or characters."""
    units = {"words": words, "sentences": sentences, "paragraphs": paragraphs, "characters": list}
    if unit not in units:
        raise ValueError(f"unit: given {unit!r}, allowed: {', '.join(units)}")
    count = len(units[unit](completion))  # type: ignore[operator]
    return float(at_least <= count and (at_most is None or count <= at_most))


def repetition(*, completion: str, n: int = 4) -> float:
    """Minus the share of n-grams of words that repeat an earlier one: 0 for none, to -1; give it a positive weight.

    Text in a script without spaces counts by characters.
    """
    units = words(completion) if len(words(completion)) > len(completion) / 20 else list(completion)
    grams = Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
    total = grams.total()
    return -(total - len(grams)) / total if total else 0.0


def language(*, completion: str, code: str = "en") -> float:
    """1 if the completion is in the language of that ISO 639-1 code; 0 for another, or without any letter."""
    return float(detected_language(completion) == code)


def detected_language(text: str) -> str | None:
    """The ISO 639-1 code of the likeliest language; None: the text has no letters."""
    if not any(character.isalpha() for character in text):
        return None
    return str(_identifier()(text)[0])


@cache
def _identifier() -> Any:
    from py3langid import classify  # loads its model, which takes seconds

    return classify
