"""`compare`: whether two answers say the same, as a pure and symmetric function of two texts.

Same and different are claims that hold under the stated conventions; whatever is neither is unknown, with no guess and
no clock: the limits on work count operations. So a verdict is the same on every machine and at every load.
"""

from dataclasses import replace
from fractions import Fraction

from megatron_rl.rewards.mathematics.conventions import Conventions
from megatron_rl.rewards.mathematics.equations import same_relation
from megatron_rl.rewards.mathematics.expression import (
    Answer,
    Apply,
    Choice,
    Collection,
    Expression,
    Matrix,
    Name,
    Number,
    Region,
    Relation,
    Unreadable,
    Value,
    Words,
    names_in,
)
from megatron_rl.rewards.mathematics.numbers import Numbers
from megatron_rl.rewards.mathematics.reading import read
from megatron_rl.rewards.mathematics.regions import as_region, same_region
from megatron_rl.rewards.mathematics.units import unit_of
from megatron_rl.rewards.mathematics.verdict import Verdict, all_of

DEFAULT = Conventions()


def compare(left: str, right: str, conventions: Conventions = DEFAULT) -> Verdict:
    """The verdict on two answers; neither is the reference: compare(a, b) = compare(b, a)."""
    if _squeezed(left) == _squeezed(right) and left.strip():
        return Verdict.same
    try:
        return compare_answers(read(left), read(right), conventions)
    except Unreadable:
        return Verdict.unknown


def compare_answers(left: Answer, right: Answer, conventions: Conventions = DEFAULT) -> Verdict:
    """The verdict on two answers that were read.

    Raises:
        Unreadable: one of them is undefined, such as 1/0.
    """
    kinds = sorted((left, right), key=lambda answer: _RANKS[type(answer)])
    return _Comparison(conventions).of(kinds[0], kinds[1])


def _squeezed(text: str) -> str:
    return " ".join(text.split())


_RANKS = {Choice: 0, Words: 1, Region: 2, Collection: 3, Relation: 4, Matrix: 5, Value: 6}
"""The order in which two kinds are given to a rule."""


class _Comparison:
    def __init__(self, conventions: Conventions) -> None:
        self._conventions, self._numbers = conventions, Numbers(conventions)

    def of(self, left: Answer, right: Answer) -> Verdict:
        """The verdict; `left` is of the kind that ranks first."""
        if isinstance(left, Choice):
            return _choice(left, right)
        if isinstance(left, Words):
            return _words(left, right)
        if isinstance(left, Region):
            return self._region(left, right)
        if isinstance(left, Collection):
            return self._collection(left, right)
        if isinstance(left, Relation):
            other = _as_relation(right)
            return Verdict.unknown if other is None else same_relation(left, other, self._numbers)
        if isinstance(left, Matrix):
            return self._matrix(left, right)
        assert isinstance(left, Value)
        assert isinstance(right, Value)
        return self._value(left, right)

    def _any(self, left: Answer, right: Answer) -> Verdict:
        return compare_answers(left, right, self._conventions)

    def _region(self, left: Region, right: Answer) -> Verdict:
        if _names_differ(left, right):
            return Verdict.different
        region = as_region(right)
        if region is None:
            return Verdict.different if isinstance(right, Value) else Verdict.unknown
        return same_region(left, region, self._numbers)

    def _collection(self, left: Collection, right: Answer) -> Verdict:
        if isinstance(right, Matrix):
            cells = [cell for row in right.rows for cell in row]
            if left.kind == "tuple" and 1 in (len(right.rows), len(right.rows[0])):
                return self._ordered(left.items, tuple(map(Value, cells)))
            return Verdict.unknown
        if isinstance(right, Relation):
            return Verdict.unknown
        if isinstance(right, Value):
            if _names_differ(left, right):
                return Verdict.different
            if left.kind == "ratio":
                return Verdict.unknown
            if left.kind == "set":
                return self._unordered(left.items, (replace(right, name=None),))
            return Verdict.different
        assert isinstance(right, Collection)
        if _names_differ(left, right):
            return Verdict.different
        if left.kind == right.kind == "set":
            return self._unordered(left.items, right.items)
        if left.kind == right.kind:
            return self._ordered(left.items, right.items)
        if {left.kind, right.kind} == {"assignments", "tuple"}:
            values = [tuple(_nameless(item) for item in side.items) for side in (left, right)]
            return self._ordered(values[0], values[1])
        if {left.kind, right.kind} == {"list", "set"}:
            verdict = self._unordered(left.items, right.items)
            return verdict if verdict is Verdict.different else Verdict.unknown
        return Verdict.different if {left.kind, right.kind} == {"set", "tuple"} else Verdict.unknown

    def _ordered(self, left: tuple[Answer, ...], right: tuple[Answer, ...]) -> Verdict:
        if len(left) != len(right):
            return Verdict.different
        return all_of([self._any(one, other) for one, other in zip(left, right, strict=True)])

    def _unordered(self, left: tuple[Answer, ...], right: tuple[Answer, ...]) -> Verdict:
        """Sets: every member of each side is one of the other."""
        table = [[self._any(one, other) for other in right] for one in left]
        columns = [list(column) for column in zip(*table, strict=True)] if table else [[] for _ in right]
        return all_of([_one_of(members) for members in [*table, *columns]])

    def _matrix(self, left: Matrix, right: Answer) -> Verdict:
        if isinstance(right, Value):
            return Verdict.different if len(left.rows) * len(left.rows[0]) > 1 else Verdict.unknown
        assert isinstance(right, Matrix)
        if (len(left.rows), len(left.rows[0])) != (len(right.rows), len(right.rows[0])):
            return Verdict.different
        pairs = [
            (one, other)
            for row, others in zip(left.rows, right.rows, strict=True)
            for one, other in zip(row, others, strict=True)
        ]
        return all_of([self._numbers.same(one, other) for one, other in pairs])

    def _value(self, left: Value, right: Value) -> Verdict:
        if _names_differ(left, right):
            one, other = _as_relation(left), _as_relation(right)
            if one is None or other is None or not (names_in(left.expression) | names_in(right.expression)):
                return Verdict.different
            return same_relation(one, other, self._numbers)
        if left.unit is None and right.unit is None:
            return self._number(left.expression, right.expression)
        if left.unit is None or right.unit is None:
            bare, with_unit = (left, right) if left.unit is None else (right, left)
            return self._with_unit(with_unit, bare)
        units = unit_of(left.unit), unit_of(right.unit)
        if units[0].dimensions != units[1].dimensions:
            if not units[0].dimensions or not units[1].dimensions:  # 3 thousand, 3000 apples
                return self._missing_unit(_scaled(left, units[0].factor), _scaled(right, units[1].factor))
            return Verdict.different
        return self._number(_scaled(left, units[0].factor), _scaled(right, units[1].factor))

    def _with_unit(self, with_unit: Value, bare: Value) -> Verdict:
        unit = unit_of(with_unit.unit or "")
        if not unit.dimensions:
            return self._number(_scaled(with_unit, unit.factor), bare.expression)
        as_written = self._missing_unit(_scaled(with_unit, unit.multiplier), bare.expression)
        if as_written is Verdict.same:
            return as_written
        if unit.dimensions == (("degree", 1),):
            converted = self._number(Apply("degrees", (with_unit.expression,)), bare.expression)
            return as_written if converted is Verdict.different else converted
        if names_in(bare.expression):  # 5 m could be 5 times m
            return Verdict.unknown
        return as_written

    def _missing_unit(self, left: Expression, right: Expression) -> Verdict:
        verdict = self._number(left, right)
        return Verdict.different if self._conventions.units == "required" else verdict

    def _number(self, left: Expression, right: Expression) -> Verdict:
        verdict = self._numbers.same(left, right)
        if verdict is Verdict.different and self._conventions.percent_sign_optional:
            for one, other in ((left, right), (right, left)):
                if isinstance(one, Apply) and one.function == "percent" and not _has_percent(other):
                    return self._numbers.same(one.arguments[0], other)
        return verdict


def _choice(left: Choice, right: Answer) -> Verdict:
    if isinstance(right, Choice):
        return Verdict.of(left.letter == right.letter)
    if isinstance(right, Words):
        return Verdict.unknown
    if isinstance(right, Value) and isinstance(right.expression, Name):
        name = right.expression.name
        if name.upper() != left.letter:
            return Verdict.different
        return Verdict.same if left.is_marked else Verdict.unknown
    if isinstance(right, Value) and names_in(right.expression) & {left.letter}:
        return Verdict.unknown
    return Verdict.different if isinstance(right, Value) else Verdict.unknown


def _words(left: Words, right: Answer) -> Verdict:
    if isinstance(right, Words):
        if left.text == right.text:
            return Verdict.same
        if " " in left.text or " " in right.text:
            return Verdict.unknown
        products = sorted(left.text) == sorted(right.text) and not (left.is_marked or right.is_marked)
        return Verdict.unknown if products and len(left.text) < 4 else Verdict.different
    if isinstance(right, Value) and not names_in(right.expression) and " " not in left.text and right.unit is None:
        return Verdict.different
    return Verdict.unknown


def _one_of(verdicts: list[Verdict]) -> Verdict:
    if Verdict.same in verdicts:
        return Verdict.same
    return Verdict.unknown if Verdict.unknown in verdicts else Verdict.different


def _names_differ(left: Answer, right: Answer) -> bool:
    """x = 5 and y = 5; a value without a name takes any."""
    names = [getattr(side, "name", None) for side in (left, right)]
    return None not in names and names[0] != names[1]


def _as_relation(answer: Answer) -> Relation | None:
    """y = 2x as an equation; None: it is none, or names a function."""
    if isinstance(answer, Relation):
        return answer
    if isinstance(answer, Value) and answer.unit is None and answer.name is not None and answer.name.isalnum():
        return Relation("=", Name(answer.name), answer.expression)
    return None


def _nameless(item: Answer) -> Answer:
    return replace(item, name=None) if isinstance(item, Value | Collection | Region) else item


def _scaled(value: Value, factor: Fraction) -> Expression:
    return value.expression if factor == 1 else Apply("mul", (value.expression, Number(factor)))


def _has_percent(expression: Expression) -> bool:
    return isinstance(expression, Apply) and (
        expression.function == "percent" or any(map(_has_percent, expression.arguments))
    )
