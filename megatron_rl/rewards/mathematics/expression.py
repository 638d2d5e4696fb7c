"""What an answer can be: numbers, names and functions of them, and the larger forms that answers take.

Trees of frozen dataclasses, so that two answers that are written alike compare equal. Nothing here is evaluated:
9^(9^9) is a tree of five nodes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction


class Unreadable(ValueError):
    """Text that is no expression, or has two readings, or one that is beyond the limits."""


@dataclass(frozen=True)
class Number:
    """A literal."""

    value: Fraction
    places: int | None = None
    """Digits after the decimal point; None: it has none."""


@dataclass(frozen=True)
class Name:
    """A variable, or one of the constants pi, e, i, infinity."""

    name: str


@dataclass(frozen=True)
class Apply:
    """A function or operator: add, mul, div, neg, pow, root, percent, degrees, plus_minus, sin, log, ..."""

    function: str
    arguments: tuple["Expression", ...]


Expression = Number | Name | Apply

CONSTANTS = frozenset({"pi", "e", "i", "infinity"})


@dataclass(frozen=True)
class Value:
    """One expression, perhaps with a unit, perhaps named: 'x = 5 cm'."""

    expression: Expression
    unit: str | None = None
    name: str | None = None
    """Of 'x = 5', the x."""


@dataclass(frozen=True)
class Collection:
    """Several answers."""

    kind: str
    """set: no order, as also of '1, 2' and '1 or 2'; tuple: (1, 2); list: [1, 2]; ratio: 1:2; assignments: x=1, y=2."""
    items: tuple["Answer", ...]
    name: str | None = None


@dataclass(frozen=True)
class Interval:
    """From a to b."""

    low: Expression
    high: Expression
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True)
class Region:
    """A union of intervals and single points."""

    parts: tuple[Interval, ...]
    name: str | None = None


@dataclass(frozen=True)
class Relation:
    """a = b, or an inequality that is none of one variable against constants."""

    operator: str
    """=, <, <=, or !="""
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Matrix:
    """Rows of expressions; a vector is a matrix of one column."""

    rows: tuple[tuple[Expression, ...], ...]


@dataclass(frozen=True)
class Words:
    """Text, in lower case, single spaces, without articles and final punctuation."""

    text: str
    is_marked: bool = False
    """Whether it was marked as text, so that 'ab' is no product."""


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple choice."""

    letter: str
    is_marked: bool = False
    """Whether brackets or a word say that it is a choice and no variable."""


Answer = Value | Collection | Region | Relation | Matrix | Words | Choice


def substituted(expression: Expression, values: Mapping[str, Expression]) -> Expression:
    """The expression with expressions in place of variables."""
    if isinstance(expression, Name):
        return values.get(expression.name, expression)
    if isinstance(expression, Apply):
        return Apply(expression.function, tuple(substituted(argument, values) for argument in expression.arguments))
    return expression


def restricted(expression: Expression) -> Iterator[Expression]:
    """What must not be negative for an expression to be real: under roots, in logarithms, below powers."""
    if isinstance(expression, Apply):
        if expression.function in ("root", "ln", "log", "pow") and names_in(expression.arguments[0]):
            exponent = expression.arguments[-1]
            if expression.function != "pow" or not isinstance(exponent, Number) or exponent.value.denominator != 1:
                yield expression.arguments[0]
        for argument in expression.arguments:
            yield from restricted(argument)


def names_in(expression: Expression) -> frozenset[str]:
    """The variables of an expression."""
    if isinstance(expression, Name):
        return frozenset() if expression.name in CONSTANTS else frozenset({expression.name})
    if isinstance(expression, Apply):
        return frozenset().union(*(names_in(argument) for argument in expression.arguments))
    return frozenset()
