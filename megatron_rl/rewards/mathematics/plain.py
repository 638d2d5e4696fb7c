"""Plain numbers, which most answers are: read by one expression, in microseconds."""

import re
from fractions import Fraction

from megatron_rl.rewards.mathematics.expression import Number, Value

_PLAIN = re.compile(
    r"\s*(\$?)\s*([-+\u2212]?)\s*(\$?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.(\d+))?|\.(\d+))(?:/([1-9]\d*))?\s*\.?\s*",
    re.ASCII,
)
MAX_CHARACTERS = 1000


def plain_number(text: str) -> Value | None:
    """The value of '72', '-1,234.50', '$3', '6/4'; None: it is not that plain."""
    if len(text) > MAX_CHARACTERS:
        return None
    match = _PLAIN.fullmatch(text)
    if match is None or (match[1] and match[3]):
        return None
    places = match[5] or match[6]
    if places and match[7]:
        return None
    value = Fraction(match[4].replace(",", "")) / int(match[7] or 1)
    number = Number(-value if match[2] in ("-", "\u2212") else value, len(places) if places else None)
    return Value(number, "$" if match[1] or match[3] else None)
