r"""Rewards for the right answer, and for the right form: 1.0 or 0.0.

Numbers are compared exactly, as fractions: 3 = 3.0 = 6/2, 0.1 = 1/10, 1,234 = 1234. What counts as the model's answer
is one rule per place where models are taught to write it:

    last_number   the last number of the text, wherever it stands
    hash          what follows the last '####' on its line, as in GSM8K
    boxed         what is in the last \boxed{...}
    answer_tag    what is in the last <answer>...</answer>
    auto          whichever of the three marks stands last; without any, last_number

A mark must hold exactly one number, units and words aside: '#### 18 or 20' is a hedge, not an answer. Text comes from a
model and may be anything, so every rule takes time linear in it, or nearly, and no rule evaluates what it reads.

A form must be there exactly once and in its place, so that it cannot be earned by repeating its marks.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from megatron_rl.rewards.extraction import Marked, after_hash, in_box, in_tag

MAX_NUMBER_CHARACTERS = 1000
"""Longer 'numbers' are no numbers: converting one takes quadratic time, and Python refuses beyond 4,300 digits."""

# A sign counts as one only where no operand stands before it: 12-7 ends in 7, =-7 in -7. A number does not begin inside
# a word or another number (x2, H2O, 1.2.3). ASCII, so that a digit may follow a letter of a script without spaces.
_NUMBER = re.compile(
    r"""(?:(?<![\w.)\]}])(?P<sign>[-+])\\?[$€£]?)?
        (?<!\w)(?<!\d\.)
        (?P<value>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?|(?<!\.)\.\d+)
        (?:/(?P<divisor>0*[1-9]\d*)(?![\d/]|[.,]\d))?""",
    re.VERBOSE | re.ASCII,
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", re.ASCII)
_MINUS = "\u2212"


def numeric_answer(*, completion: str, answer: str | None, extract: str = "auto") -> float:
    """1.0 if the model's answer equals the reference as a number.

    Args:
        completion: text of the model.
        answer: reference; must hold exactly one number.
        extract: a rule of the module's docstring.

    Raises:
        ValueError: the reference is missing or holds no single number, or the rule is unknown.
    """
    if extract not in EXTRACTIONS:
        raise ValueError(f"extract={extract!r} is unknown; allowed are {', '.join(EXTRACTIONS)}")
    reference = only_number(_reference(answer))
    if reference is None:
        raise ValueError(f"the reference answer {answer!r} does not hold exactly one number")
    return float(EXTRACTIONS[extract](completion) == reference)


def exact_match(*, completion: str, answer: str | None) -> float:
    """1.0 if the completion is the reference answer, white space around both aside."""
    return float(completion.strip() == _reference(answer).strip())


def numbers(text: str) -> list[Fraction | None]:
    """The numbers of a text, in order; None stands for one too long to be read."""
    return [_value(match) for match in _NUMBER.finditer(_plain(text))]


def only_number(text: str) -> Fraction | None:
    """The one number of a text, or None if there is none or more than one."""
    found = numbers(text)
    return found[0] if len(found) == 1 else None


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else: '-1,234.5', '1/2'; no unit, no space."""
    match = _NUMBER.fullmatch(text)
    return match is not None and _value(match) is not None


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > MAX_NUMBER_CHARACTERS:
        return None
    value = Fraction(match["value"].replace(",", "")) / int(match["divisor"] or 1)
    return -value if match["sign"] == "-" else value


def _plain(text: str) -> str:
    r"""LaTeX's thousands (1{,}234 1\,234), fractions and the typographic minus in plain characters."""
    if _MINUS in text:
        text = text.replace(_MINUS, "-")
    if "\\" in text or "{,}" in text:
        text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
        text = _LATEX_FRACTION.sub(r"\1/\2", text)
    return text


def _reference(answer: str | None) -> str:
    if answer is None:
        raise ValueError("the row has no reference answer (data.answer_key)")
    return answer


def _from_mark(*marks: Callable[[str], Marked | None]) -> Callable[[str], Fraction | None]:
    def extract(text: str) -> Fraction | None:
        found = [marked for marked in (mark(text) for mark in marks) if marked is not None]
        return only_number(max(found)[1]) if found else None

    return extract


def _last_number(text: str) -> Fraction | None:
    found = numbers(text)
    return found[-1] if found else None


_any_mark = _from_mark(after_hash, in_box, in_tag)


def _auto(text: str) -> Fraction | None:
    marked = any(mark(text) is not None for mark in (after_hash, in_box, in_tag))
    return _any_mark(text) if marked else _last_number(text)


EXTRACTIONS: dict[str, Callable[[str], Fraction | None]] = {
    "auto": _auto,
    "last_number": _last_number,
    "hash": _from_mark(after_hash),
    "boxed": _from_mark(in_box),
    "answer_tag": _from_mark(in_tag),
}
