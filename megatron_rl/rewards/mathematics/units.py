"""Units and words behind a number: 5 cm, $5, 30 km/h, 12 apples, 3 million.

A unit is a product of powers of base dimensions with an exact factor, so 5 cm = 0.05 m, while 5 cm and 5 kg are
different whatever the numbers. A word that is no unit is a dimension of its own: 5 apples are not 5 pears.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_rl.rewards.mathematics.expression import Unreadable

_F = Fraction
_UNITS: dict[str, tuple[str, Fraction]] = {
    "m": ("length", _F(1)), "meter": ("length", _F(1)), "metre": ("length", _F(1)),
    "km": ("length", _F(1000)), "kilometer": ("length", _F(1000)), "kilometre": ("length", _F(1000)),
    "cm": ("length", _F(1, 100)), "centimeter": ("length", _F(1, 100)), "centimetre": ("length", _F(1, 100)),
    "mm": ("length", _F(1, 1000)), "millimeter": ("length", _F(1, 1000)), "dm": ("length", _F(1, 10)),
    "inch": ("length", _F(254, 10000)), "in": ("length", _F(254, 10000)), "foot": ("length", _F(3048, 10000)),
    "feet": ("length", _F(3048, 10000)), "ft": ("length", _F(3048, 10000)), "yard": ("length", _F(9144, 10000)),
    "yd": ("length", _F(9144, 10000)), "mile": ("length", _F(1609344, 1000)), "mi": ("length", _F(1609344, 1000)),
    "g": ("mass", _F(1)), "gram": ("mass", _F(1)), "kg": ("mass", _F(1000)), "kilogram": ("mass", _F(1000)),
    "mg": ("mass", _F(1, 1000)), "lb": ("mass", _F(45359237, 100000)), "pound": ("mass", _F(45359237, 100000)),
    "ounce": ("mass", _F(45359237, 1600000)), "oz": ("mass", _F(45359237, 1600000)),
    "s": ("time", _F(1)), "sec": ("time", _F(1)), "second": ("time", _F(1)), "ms": ("time", _F(1, 1000)),
    "min": ("time", _F(60)), "minute": ("time", _F(60)), "h": ("time", _F(3600)), "hr": ("time", _F(3600)),
    "hour": ("time", _F(3600)), "day": ("time", _F(86400)), "week": ("time", _F(604800)),
    "month": ("month", _F(1)), "year": ("month", _F(12)), "yr": ("month", _F(12)),
    "l": ("volume", _F(1)), "liter": ("volume", _F(1)), "litre": ("volume", _F(1)), "ml": ("volume", _F(1, 1000)),
    "milliliter": ("volume", _F(1, 1000)), "gallon": ("gallon", _F(1)), "quart": ("gallon", _F(1, 4)),
    "pint": ("gallon", _F(1, 8)), "cup": ("gallon", _F(1, 16)),
    "n": ("force", _F(1)), "newton": ("force", _F(1)), "j": ("energy", _F(1)), "joule": ("energy", _F(1)),
    "kj": ("energy", _F(1000)), "w": ("power", _F(1)), "watt": ("power", _F(1)), "kw": ("power", _F(1000)),
    "hz": ("frequency", _F(1)), "v": ("voltage", _F(1)), "volt": ("voltage", _F(1)),
    "$": ("dollar", _F(1)), "dollar": ("dollar", _F(1)), "usd": ("dollar", _F(1)), "cent": ("dollar", _F(1, 100)),
    "€": ("euro", _F(1)), "euro": ("euro", _F(1)), "eur": ("euro", _F(1)), "£": ("pound sterling", _F(1)),
    "gbp": ("pound sterling", _F(1)), "¥": ("yen", _F(1)), "yen": ("yen", _F(1)), "₹": ("rupee", _F(1)),
    "rupee": ("rupee", _F(1)),
    "degree": ("degree", _F(1)), "°": ("degree", _F(1)), "celsius": ("celsius", _F(1)), "°c": ("celsius", _F(1)),
    "fahrenheit": ("fahrenheit", _F(1)), "°f": ("fahrenheit", _F(1)),
    "radian": ("radian", _F(1)), "rad": ("radian", _F(1)),
    "mph": ("mile per hour", _F(1)),
    "hundred": ("", _F(100)), "thousand": ("", _F(1000)), "million": ("", _F(10**6)), "billion": ("", _F(10**9)),
    "trillion": ("", _F(10**12)), "dozen": ("", _F(12)),
}  # fmt: skip
_COMPOUND = {"mile per hour": (("length", 1), ("time", -1), _F(1609344, 3600000))}
_ATTACHABLE = frozenset("cm km mm dm kg mg ft yd mi lb oz min hr sec ml mph cents dollars".split())  # noqa: SIM905
_SPACED = frozenset("m g s h L N J W V l".split())  # noqa: SIM905

_TEXT_END = re.compile(
    r"\\text\s*\{([^{}]*)\}\s*((?:\^\s*\{?\s*\d\s*\}?)?(?:\s*/\s*\\text\s*\{[^{}]*\}(?:\^\{?\d\}?)?)?)$"
)
_DEGREE_END = re.compile(r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\text\s*\{\s*([CF])\s*\}|([CF]))?$")
_FUNCTION = re.compile(r"sin|cos|tan|sec|csc|cot")  # of an angle: the degrees are its own
_WORD_END = re.compile(r"(?<=[\d)}!%])(\s*)([A-Za-z][A-Za-z./^{}\d\s-]*)$")
_CURRENCY_START = re.compile(r"^([-+]?)\s*(?:\\text\s*\{\s*)?([$€£¥₹])\s*(?:\}\s*)?(?=[\d.(\\])")
_CURRENCY_END = re.compile(r"(?<=\d)\s*([€£¥₹$])$")
_NOISE = re.compile(r"\b(?:of|the|a|an|square|sq|cubic|cu|each|total|in|whole|more|left|away|long|tall|old)\b")
_RELATING = re.compile(
    r"\b(?:than|times|plus|minus|to|or|and|not|if|when|where|below|above|under|over|from|zero|negative|divided|squared"
    r"|cubed|half|halves|thirds?|quarters?|modulo|mod|base|ago|before|after|out|is|are|was|has|have|which|about|by)\b"
)
"""Words that make of a number and its unit something else."""


@dataclass(frozen=True)
class Unit:
    """A product of powers of dimensions, times a factor."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction
    multiplier: Fraction = Fraction(1)
    """Of words such as million, which is part of the number."""


def split_unit(text: str) -> tuple[str, str | None]:
    """A cleaned answer without its unit, and the unit's text."""
    currency = _CURRENCY_START.match(text)
    if currency:
        rest, behind = split_unit(text[currency.end() :])
        return currency[1] + rest, f"{currency[2]} {behind}" if behind else currency[2]
    currency = _CURRENCY_END.search(text)
    if currency:
        return text[: currency.start()], currency[1]
    degrees = _DEGREE_END.search(text)
    if degrees and degrees.start() and not _FUNCTION.search(text):
        return text[: degrees.start()], {"C": "°c", "F": "°f"}.get(degrees[1] or degrees[2] or "", "°")
    marked = _TEXT_END.search(text)
    if marked and marked.start():
        power = marked[2].replace("{", "").replace("}", "").replace("\\text", "").replace(" ", "")
        return text[: marked.start()].strip(), f"{marked[1].strip()}{power}" or None
    word = _WORD_END.search(text)
    if word and _is_unit(word[1], word[2]):
        return text[: word.start()].strip(), word[2].strip()
    return text, None


def _is_unit(space: str, word: str) -> bool:
    first = re.split(r"[\s/^]", word.strip())[0]
    if not space:
        return first in _ATTACHABLE
    return len(first) > 2 or first in _SPACED or first in _ATTACHABLE or first == "in"


@lru_cache(maxsize=4096)
def unit_of(text: str) -> Unit:
    """The unit that a text names.

    Raises:
        Unreadable: it has more words than a unit.
    """
    text = text.strip().lower().rstrip(".")
    powers = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
    power = next((number for word, number in powers.items() if re.match(rf"{word}\b", text)), 1)
    text = _NOISE.sub(" ", text.replace("{", "").replace("}", "").replace("per ", "/ ").replace(" an hour", "/hour"))
    dimensions: dict[str, int] = {}
    factor = multiplier = Fraction(1)
    if len(text.split()) > 6 or _RELATING.search(text):
        raise Unreadable("a phrase behind a number")
    for place, part in enumerate(text.split("/")):
        sign = -1 if place else 1
        for word in re.split(r"[\s*-]+", part.strip()):
            if not word:
                continue
            name, _, exponent = word.partition("^")
            times = sign * (int(exponent) if exponent.isdigit() and len(exponent) == 1 else 1)
            times = times * power if not place else times
            dimension, scale = _base(name)
            factor *= scale**times
            multiplier *= Fraction(1) if dimension else scale**times
            if dimension in _COMPOUND:
                above, below, compound = _COMPOUND[dimension]
                factor *= compound**times
                for base, base_times in (above, below):
                    dimensions[base] = dimensions.get(base, 0) + base_times * times
            elif dimension:
                dimensions[dimension] = dimensions.get(dimension, 0) + times
    return Unit(tuple(sorted((name, times) for name, times in dimensions.items() if times)), factor, multiplier)


def _base(name: str) -> tuple[str, Fraction]:
    for spelling in (name, name.removesuffix("s"), name.removesuffix("es")):
        if spelling in _UNITS:
            return _UNITS[spelling]
    if not re.fullmatch(r"[a-z'-]+", name):
        raise Unreadable(f"no unit: {name!r}")
    singular = name[:-3] + "y" if name.endswith("ies") else name.removesuffix("s")
    return singular, Fraction(1)
