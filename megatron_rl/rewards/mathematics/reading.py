r"""Answers from their text.

Order of the rules: a plain number, a letter of a multiple choice, words, then what stands at the top level of the
formula: several answers (',' ';' 'or'), brackets, relations, unions, ratios, and last one expression with its unit.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from megatron_rl.rewards.mathematics.cleaning import clean
from megatron_rl.rewards.mathematics.expression import (
    Answer,
    Apply,
    Choice,
    Collection,
    Expression,
    Interval,
    Matrix,
    Name,
    Number,
    Region,
    Relation,
    Unreadable,
    Value,
    Words,
)
from megatron_rl.rewards.mathematics.parser import MAX_CHARACTERS, parse
from megatron_rl.rewards.mathematics.plain import plain_number
from megatron_rl.rewards.mathematics.units import split_unit, unit_of

MAX_ITEMS = 64
_MAX_NESTING = 12

_CHOICE = re.compile(r"\(([A-Za-z])\)(?:\s*[.:]?\s*\S.*)?|([A-J])[).:](?:\s+\S.*)?|([A-J])", re.DOTALL)
_NAMED_CHOICE = re.compile(r"(?:option|choice|answer)\s*:?\s*\(?([A-Za-z])\)?", re.IGNORECASE)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_PROSE = re.compile(r"[A-Za-z][A-Za-z '\u2019,-]*[A-Za-z]")
_NAME = re.compile(r"(?:[A-Za-z]|\\[a-zA-Z]+)(?:_(?:\{\w+\}|\w))?'*(?:\s*\(\s*[a-zA-Z]\s*\))?")
_NAMES = re.compile(rf"\(\s*{_NAME.pattern}(?:\s*,\s*{_NAME.pattern})+\s*\)")
_GROUP = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SEPARATOR = re.compile(r"\\text\s*\{[\s,]*(?:or|and)[\s,]*\}|\b(?:or|and)\b|[,;]")
_RELATION = re.compile(r"<=|>=|!=|=|<|>|\\in(?![a-zA-Z])")
_MATRIX = re.compile(r"\\begin\{([pbv]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_ARTICLES = re.compile(r"\b(?:the|a|an)\b")
_EMPTY = frozenset(("no solution", "no solutions", "none", "empty set", "no real solution", "no real solutions"))
_SYNONYMS = {"dne": "does not exist", "doesn't exist": "does not exist", "infinite": "infinity"}
_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # noqa: E501, SIM905
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_NUMBER_WORDS = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}


@lru_cache(maxsize=16384)
def read(text: str) -> Answer:
    """What an answer says.

    Raises:
        Unreadable: empty, too long, or a formula that has no single reading.
    """
    value = plain_number(text)
    if value is not None:
        return value
    if len(text) > MAX_CHARACTERS:
        raise Unreadable("too long")
    cleaned = clean(text)
    if not cleaned:
        raise Unreadable("empty")
    return _choice(cleaned) or _words(cleaned) or _formula(cleaned, 0)


def _choice(text: str) -> Choice | None:
    marked = _TEXT.fullmatch(text)
    inner = marked[1].strip() if marked else text
    match = _NAMED_CHOICE.fullmatch(inner)
    if match:
        return Choice(match[1].upper(), is_marked=True)
    match = _CHOICE.fullmatch(inner)
    if match is None:
        return None
    bracketed = match[1] or match[2]
    if match[1] and match[1].islower() and len(inner) > 3:  # (x) + 1
        return None
    if match[1] and (match[1].upper() > "J" or re.match(r"\([A-Za-z]\)\s*[-+*/^=(<>]", inner)):
        return None
    return Choice((bracketed or match[3]).upper(), is_marked=bool(bracketed or marked))


def _words(text: str) -> Answer | None:
    marked = _TEXT.fullmatch(text)
    inner = marked[1].strip() if marked else text
    if not _PROSE.fullmatch(inner) or (not marked and _looks_like_a_list(inner)):
        return None
    words = " ".join(_ARTICLES.sub(" ", inner.lower().replace("\u2019", "'").replace(",", " ")).split())
    words = _SYNONYMS.get(words, words)
    if words in _EMPTY:
        return Collection("set", ())
    if words in ("infinity", "positive infinity", "pi"):
        return Value(Name("pi" if words == "pi" else "infinity"))
    number = _number_word(words)
    if number is not None:
        return Value(Number(number))
    return Words(words, is_marked=marked is not None)


def _looks_like_a_list(text: str) -> bool:
    """x, y, z: single letters."""
    return all(len(word) == 1 for word in re.split(r"[\s,]+", text))


def _number_word(words: str) -> Fraction | None:
    tens, _, ones = words.replace("-", " ").partition(" ")
    if tens in _NUMBER_WORDS and not ones:
        return Fraction(_NUMBER_WORDS[tens])
    if tens in _TENS and ones in _SMALL[1:10]:
        return Fraction(_NUMBER_WORDS[tens] + _NUMBER_WORDS[ones])
    return None


def _formula(text: str, nesting: int) -> Answer:
    text = text.strip()
    if nesting > _MAX_NESTING or not text:
        raise Unreadable("too deep" if text else "a part is missing")
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(matrix[2])
    parts = _split(text, _SEPARATOR)
    if len(parts) > 1:
        return _several([_formula(part, nesting + 1) for part in parts if part.strip()])
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}"):
        return Collection("set", ())
    bracketed = _bracketed(text, nesting)
    if bracketed is not None:
        return bracketed
    operators = list(_top_level(text, _RELATION))
    if operators:
        return _relation(text, operators, nesting)
    parts = _split(text, re.compile(r"\\cup(?![a-zA-Z])"))
    if len(parts) > 1:
        return Region(tuple(part for piece in parts for part in _region(_formula(piece, nesting + 1)).parts))
    parts = _split(text, re.compile(":"))
    if len(parts) > 1:
        return Collection("ratio", tuple(Value(parse(part)) for part in parts))
    if text in ("\\mathbb{R}", "\\R"):
        return Region((Interval(_NEGATIVE_INFINITY, Name("infinity"), False, False),))
    return _value(text, separates=nesting > 0)


_NEGATIVE_INFINITY = Apply("neg", (Name("infinity"),))


def _value(text: str, *, separates: bool) -> Answer:
    rest, unit = split_unit(text)
    if unit is not None:
        unit_of(unit)  # a phrase is no unit
    stripped = rest.strip()
    if stripped in ("+\\infty", "\\infty"):
        return Value(Name("infinity"))
    expression = parse(stripped, separates=separates)
    if _has_sign_pair(expression):
        upper, lower = (Value(_with_sign(expression, sign), unit) for sign in ("", "neg"))
        return Collection("set", (upper, lower))
    return Value(expression, unit)


def _has_sign_pair(expression: Expression) -> bool:
    return isinstance(expression, Apply) and (
        expression.function == "plus_minus" or any(map(_has_sign_pair, expression.arguments))
    )


def _with_sign(expression: Expression, sign: str) -> Expression:
    if not isinstance(expression, Apply):
        return expression
    arguments = tuple(_with_sign(argument, sign) for argument in expression.arguments)
    if expression.function != "plus_minus":
        return Apply(expression.function, arguments)
    return Apply("neg", arguments) if sign else arguments[0]


def _several(items: list[Answer]) -> Answer:
    """'1, 2' and 'x = 1 or x = 2' are sets; 'x = 1, y = 2' are assignments; 'x < 1 or x > 2' is a region."""
    if len(items) > MAX_ITEMS:
        raise Unreadable("too many parts")
    if len(items) == 1:
        return items[0]
    if all(isinstance(item, Region) for item in items):
        return Region(tuple(part for item in items for part in _region(item).parts), _region(items[0]).name)
    names = [item.name if isinstance(item, Value | Collection) else None for item in items]
    if all(names) and len(set(names)) == len(names):
        return Collection("assignments", tuple(sorted(items, key=lambda item: str(getattr(item, "name", "")))))
    name = names[0]
    if any(other not in (None, name) for other in names):
        raise Unreadable("names and values mixed")
    return Collection("set", tuple(_flattened(items)), name)


def _flattened(items: list[Answer]) -> Iterator[Answer]:
    for item in items:
        if isinstance(item, Collection) and item.kind == "set":
            yield from item.items
        else:
            yield replace(item, name=None) if isinstance(item, Value | Collection) else item


def _bracketed(text: str, nesting: int) -> Answer | None:
    """(a, b), [a, b), \\{a, b\\}: with a comma at their level; one expression in brackets is none of these."""
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        if not (text.startswith(opening) and text.endswith(closing)) or not _encloses(text):
            continue
        inner = text[len(opening) : -len(closing)]
        parts = _split(inner, re.compile("[,;]"), grouped=False)
        if opening == "\\{":
            return Collection("set", tuple(_flattened([_formula(part, nesting + 1) for part in parts])))
        if len(parts) == 1:
            return None
        items = tuple(_formula(part, nesting + 1) for part in parts)
        if len(items) > MAX_ITEMS:
            raise Unreadable("too many parts")
        if opening + closing in ("(]", "[)") or any(_is_infinite(item) for item in items):
            return Region((_interval(items, opening, closing),))
        return Collection("tuple" if opening == "(" else "list", items)
    return None


def _is_infinite(item: Answer) -> bool:
    return isinstance(item, Value) and item.expression in (Name("infinity"), _NEGATIVE_INFINITY)


def _interval(items: tuple[Answer, ...], opening: str, closing: str) -> Interval:
    if len(items) != 2 or not all(isinstance(item, Value) and item.unit is None for item in items):
        raise Unreadable("an interval has two ends")
    low, high = (item.expression for item in items if isinstance(item, Value))
    return Interval(low, high, opening == "[", closing == "]")


def _region(item: Answer) -> Region:
    """Intervals and points as a region; (1, 2) beside a union is an interval."""
    if isinstance(item, Region):
        return item
    if isinstance(item, Collection) and item.kind in ("tuple", "list"):
        bracket = "()" if item.kind == "tuple" else "[]"
        return Region((_interval(item.items, bracket[0], bracket[1]),), item.name)
    if isinstance(item, Collection) and item.kind == "set" and all(isinstance(part, Value) for part in item.items):
        points = (part.expression for part in item.items if isinstance(part, Value))
        return Region(tuple(Interval(point, point, True, True) for point in points), item.name)
    raise Unreadable("no set of numbers")


def _relation(text: str, operators: list[re.Match[str]], nesting: int) -> Answer:
    signs = [match[0] for match in operators]
    ends = [0, *(match.end() for match in operators)]
    starts = [*(match.start() for match in operators), len(text)]
    sides = [text[end:start].strip() for end, start in zip(ends, starts, strict=True)]
    if set(signs) <= {"=", "\\in"}:
        if _NAME.fullmatch(sides[0]) or _NAMES.fullmatch(sides[0]):
            named = _formula(sides[-1], nesting + 1)
            name = sides[0].replace(" ", "")
            return replace(named, name=name) if isinstance(named, Value | Collection | Region) else named
        if signs == ["="] and _NAME.fullmatch(sides[1]):
            return _relation(f"{sides[1]}={sides[0]}", list(_top_level(f"{sides[1]}={sides[0]}", _RELATION)), nesting)
        if signs != ["="]:
            raise Unreadable("a chain of equations")
    expressions = [parse(side) for side in sides]
    if signs[0] in (">", ">="):
        expressions.reverse()
        signs = [sign.replace(">", "<") for sign in reversed(signs)]
    if any(sign not in ("<", "<=") for sign in signs) and len(signs) > 1:
        raise Unreadable("relations mixed")
    infinities = _NEGATIVE_INFINITY, Name("infinity")
    if signs[0].startswith("<") and len(signs) == 1:
        left, right = expressions
        if isinstance(left, Name):
            return Region((Interval(infinities[0], right, False, signs[0] == "<="),), left.name)
        if isinstance(right, Name):
            return Region((Interval(left, infinities[1], signs[0] == "<=", False),), right.name)
    if len(signs) == 2 and isinstance(expressions[1], Name):
        low, middle, high = expressions
        return Region((Interval(low, high, signs[0] == "<=", signs[1] == "<="),), getattr(middle, "name", None))
    if len(signs) != 1:
        raise Unreadable("a chain of relations")
    return Relation(signs[0], expressions[0], expressions[1])


def _matrix(inner: str) -> Matrix:
    rows = [row for row in inner.split("\\\\") if row.strip()]
    cells = tuple(tuple(parse(cell.strip()) for cell in row.split("&")) for row in rows)
    if not cells or len({len(row) for row in cells}) != 1 or len(cells) * len(cells[0]) > MAX_ITEMS:
        raise Unreadable("no matrix")
    return Matrix(cells)


def _encloses(text: str) -> bool:
    """Whether the first bracket closes at the end."""
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth == 0 and at < len(text) - 1 and text[at] in ")]}":
            return False
    return depth == 0


def _top_level(text: str, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Matches outside of brackets."""
    depth, at = 0, 0
    for match in pattern.finditer(text):
        for character in text[at : match.start()]:
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        at = match.start()
        if depth == 0:
            yield match


def _split(text: str, pattern: re.Pattern[str], *, grouped: bool = True) -> list[str]:
    groups = [match.span() for match in _GROUP.finditer(text)] if grouped else []
    parts, start = [], 0
    for match in _top_level(text, pattern):
        if any(low < match.start() < high for low, high in groups):
            continue
        parts.append(text[start : match.start()])
        start = match.end()
    return [*parts, text[start:]]
