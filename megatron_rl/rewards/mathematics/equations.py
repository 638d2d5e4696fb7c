"""Equations and inequalities in several variables: the same when their sides differ by a constant factor.

Different is claimed where a point is found that satisfies one and not the other; sets of solutions that are equal for
another reason (x^2 = 0, x = 0) stay unknown.
"""

from fractions import Fraction

from megatron_rl.rewards.mathematics.expression import (
    Apply,
    Expression,
    Number,
    Relation,
    Unreadable,
    names_in,
    substituted,
)
from megatron_rl.rewards.mathematics.normal_form import Polynomial, Quotient, TooLarge, rational
from megatron_rl.rewards.mathematics.numbers import Numbers
from megatron_rl.rewards.mathematics.reduction import Reduction
from megatron_rl.rewards.mathematics.verdict import Verdict

_POINTS = 4


def same_relation(left: Relation, right: Relation, numbers: Numbers) -> Verdict:
    """The verdict on two relations."""
    if left == right:
        return Verdict.same
    if left.operator != right.operator:
        return Verdict.different if {left.operator, right.operator} <= {"<", "<="} else Verdict.unknown
    try:
        reduction = Reduction(log_base=numbers.conventions.log_base)
        first, second = (_difference(relation, reduction) for relation in (left, right))
        if left.operator != "=" and None in (rational(first.denominator), rational(second.denominator)):
            return Verdict.unknown
        ratio = _ratio(first.numerator, second.numerator)
        if ratio is not None and (ratio > 0 or left.operator in ("=", "!=")):
            return Verdict.same
        if left.operator == "=" and (_separated(left, right, numbers) or _separated(right, left, numbers)):
            return Verdict.different
        if left.operator != "=" and _total_degree(first.numerator) == _total_degree(second.numerator) == 1:
            return Verdict.different  # two half planes
    except (TooLarge, Unreadable):
        return Verdict.unknown
    return Verdict.unknown


def _difference(relation: Relation, reduction: Reduction) -> Quotient:
    algebra = reduction.algebra
    return algebra.add(reduction.quotient(relation.left), algebra.negate(reduction.quotient(relation.right)))


def _ratio(first: Polynomial, second: Polynomial) -> Fraction | None:
    """c with first = c second."""
    if first.keys() != second.keys() or not first:
        return None
    ratios = {factor / second[monomial] for monomial, factor in first.items()}
    return ratios.pop() if len(ratios) == 1 else None


def _total_degree(polynomial: Polynomial) -> Fraction:
    return max((sum((exponent for _, exponent in m), Fraction(0)) for m in polynomial), default=Fraction(0))


def _separated(one: Relation, other: Relation, numbers: Numbers) -> bool:
    """Whether a real point solves `one` and not `other`; points come from solving for a variable of degree 1 or 2."""
    variables = sorted(names_in(one.left) | names_in(one.right) | names_in(other.left) | names_in(other.right))
    for unknown in variables:
        for number in range(_POINTS):
            point: dict[str, Expression] = {
                name: Number(Fraction((3 * number + place) % 5 - 2, 1 + number))
                for place, name in enumerate(v for v in variables if v != unknown)
            }
            root = _solution(substituted(_minus(one), point), unknown)
            if root is None:
                continue
            residue = substituted(_minus(other), {**point, unknown: root})
            if numbers.same(residue, Number(Fraction(0))) is Verdict.different:
                return True
    return False


def _minus(relation: Relation) -> Expression:
    return Apply("add", (relation.left, Apply("neg", (relation.right,))))


def _solution(expression: Expression, unknown: str) -> Expression | None:
    """A real root of a polynomial of degree 1 or 2 with rational coefficients."""
    try:
        value = Reduction().quotient(expression)
    except Unreadable:
        return None
    coefficients: dict[int, Fraction] = {}
    if rational(value.denominator) is None:
        return None
    for monomial, factor in value.numerator.items():
        keys = dict(monomial)
        exponent = keys.pop(unknown, Fraction(0))
        if keys or exponent.denominator != 1 or exponent > 2:
            return None
        coefficients[int(exponent)] = factor
    free, linear, square = (coefficients.get(power, Fraction(0)) for power in range(3))
    if not square:
        return Number(-free / linear) if linear else None
    discriminant = linear * linear - 4 * square * free
    if discriminant < 0:
        return None
    root = Apply("root", (Number(discriminant), Number(Fraction(2))))
    return Apply("div", (Apply("add", (Number(-linear), root)), Number(2 * square)))
