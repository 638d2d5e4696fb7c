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
_PART = r"(?:\{{\s*(?P<{0}>[-+]?\s?(?:\d+(?:\.\d+)?|\.\d+))\s*\}}|(?P<{0}_digit>\d))"
_LATEX_FRACTION = re.compile(
    r"(?:(?<![\w.,])(?P<whole>\d+)\s?)?\\[dtc]?frac\s*" + _PART.format("over") + r"\s*" + _PART.format("under"),
    re.ASCII,
)
_MIXED = re.compile(r"(?<![\w.,/])(\d+)\s(\d+)/(\d+)(?![\d/.,])", re.ASCII)
_MINUSES = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-"))
"""Minus, hyphens, en dash, and their small and full-width forms."""
_UNIT = re.compile(
    r"(?:\^\s?\{?\s?\\circ\s?\}?|\^\s?\{\s?\\text\{?o\}?\s?\})"  # degrees
    r"|(?<=[A-Za-z\u00b5}])\s?(?:\^\s?(?:\{\s?-?\d\s?\}|-?\d)|[\u00b2\u00b3])(?!\d)"  # a unit's exponent
)
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname|left|right|quad|qquad|displaystyle)(?![a-z])"
)
_OPERATION = re.compile(r"\\[a-zA-Z]|[\^*\u00d7\u00f7\u221a\u03c0]|\b(?:pi|sqrt|log|ln|sin|cos|tan|exp)\b")
"""What makes more of a number than the number: what is left of LaTeX's commands, powers, products, roots."""


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
    """The one number of a text, or None if there is none, more than one, or an expression around it.

    Words and units aside, also with an exponent. A mixed number, 1 1/2, is one number.
    """
    text = _WORDS.sub(" ", _UNIT.sub("", _plain(text)))
    text = _MIXED.sub(_mixed, re.sub(r"(?<=\d) ?/ ?(?=\d)", "/", text))
    if _OPERATION.search(text):
        return None
    found = numbers(text)
    return found[0] if len(found) == 1 else None


def is_number(text: str) -> bool:
    """Whether a text is one number and nothing else: '-1,234.5', '1/2'; no unit, no space."""
    match = _NUMBER.fullmatch(text.translate(_MINUSES))
    return match is not None and _value(match) is not None


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > MAX_NUMBER_CHARACTERS:
        return None
    value = Fraction(match["value"].replace(",", "")) / int(match["divisor"] or 1)
    return -value if match["sign"] == "-" else value


def _plain(text: str) -> str:
    r"""LaTeX's thousands (1{,}234 1\,234), fractions and the typographic minus in plain characters."""
    text = text.translate(_MINUSES)
    if "\\" in text or "{,}" in text:
        text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
        text = _LATEX_FRACTION.sub(_fraction, text)
    return text


def _fraction(match: re.Match[str]) -> str:
    r"""A LaTeX fraction, or mixed number, as n/d; as it is where it has no value."""
    if len(match[0]) > MAX_NUMBER_CHARACTERS:
        return match[0]
    over, under = (Fraction((match[name] or match[f"{name}_digit"]).replace(" ", "")) for name in ("over", "under"))
    if under == 0 or (match["whole"] and over / under < 0):
        return match[0]
    value = int(match["whole"] or 0) + over / under
    if value < 0 and match.string[: match.start()].endswith(("-", "+")):
        return match[0]
    return f"{value.numerator}/{value.denominator}"


def _mixed(match: re.Match[str]) -> str:
    """1 1/2 as 3/2; as it is where the fraction is none that a mixed number has."""
    if len(match[0]) > MAX_NUMBER_CHARACTERS:
        return match[0]
    whole, over, under = (int(part) for part in match.groups())
    return f"{whole * under + over}/{under}" if 0 < over < under else match[0]


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
