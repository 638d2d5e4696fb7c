"""Whether two expressions are equal: identities proven, differences proven, the rest unknown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_rl.rewards.mathematics.conventions import Conventions
from megatron_rl.rewards.mathematics.expression import (
    Apply,
    Expression,
    Name,
    Number,
    Unreadable,
    restricted,
    substituted,
)
from megatron_rl.rewards.mathematics.intervals import enclosure, is_zero
from megatron_rl.rewards.mathematics.normal_form import Atom, Polynomial, Quotient, TooLarge, rational
from megatron_rl.rewards.mathematics.reduction import Reduction
from megatron_rl.rewards.mathematics.verdict import Verdict

_POINTS = 6
_TOLERANCE_BITS = 256


@dataclass(frozen=True)
class Numbers:
    """Compares expressions under conventions."""

    conventions: Conventions

    def same(self, left: Expression, right: Expression) -> Verdict:
        """The verdict on two expressions."""
        if left == right:
            return Verdict.same
        infinite = [_infinity(side) for side in (left, right)]
        if any(infinite):
            return Verdict.of(infinite[0] == infinite[1])
        try:
            reduction = Reduction(log_base=self.conventions.log_base)
            first, second = reduction.quotient(left), reduction.quotient(right)
            domain = [*restricted(left), *restricted(right)]
            verdict = self._compared(reduction, first, second, domain)
            if verdict is Verdict.different and self._tolerates(left, right, first, second, reduction.algebra.atoms):
                return Verdict.same
            return verdict
        except TooLarge:
            return Verdict.unknown

    def order(self, left: Expression, right: Expression) -> int | None:
        """-1, 0, 1 for left <, =, > right; None: not decided."""
        infinite = [_infinity(side) for side in (left, right)]
        if any(infinite):
            return (infinite[0] > infinite[1]) - (infinite[0] < infinite[1])
        reduction = Reduction(log_base=self.conventions.log_base)
        algebra = reduction.algebra
        difference = algebra.add(reduction.quotient(left), algebra.negate(reduction.quotient(right)))
        if self._zero(difference.numerator, algebra.atoms):
            return 0
        inside = enclosure(difference, algebra.atoms, _TOLERANCE_BITS)
        if inside is None or inside[0] <= 0 <= inside[1]:
            return None
        return 1 if inside[0] > 0 else -1

    def _compared(
        self, reduction: Reduction, first: Quotient, second: Quotient, domain: Sequence[Expression]
    ) -> Verdict:
        algebra = reduction.algebra
        for value in (first, second):
            if self._zero(value.denominator, algebra.atoms, domain) is not False:
                return Verdict.unknown  # perhaps undefined
        crossed = algebra.add(first, algebra.negate(second)).numerator
        zero = self._zero(crossed, algebra.atoms, domain)
        return Verdict.unknown if zero is None else Verdict.of(zero)

    def _zero(
        self, polynomial: Polynomial, atoms: Mapping[str, Atom], domain: Sequence[Expression] = ()
    ) -> bool | None:
        """Whether a polynomial is identically 0, where what is in `domain` is not negative."""
        if rational(polynomial) is not None:
            return not polynomial
        used = {key for monomial in polynomial for key, _ in monomial}
        variables = _variables(used, atoms)
        transcendental = {key for key in used if key in ("pi", "e")}
        plain = all(atoms[key].kind in ("variable", "prime", "constant") for key in used)
        if plain and len(transcendental) < 2:
            return False  # its terms are independent
        if not variables:
            return is_zero(polynomial, atoms)
        for number in range(_POINTS):
            point = _point(sorted(variables), number)
            if is_zero(polynomial, atoms, point) is False and self._is_inside(domain, point):
                return False
        return None

    def _is_inside(self, domain: Sequence[Expression], point: Mapping[str, Fraction]) -> bool:
        values = {name: Number(value) for name, value in point.items()}
        try:
            signs = [self.order(substituted(expression, values), Number(Fraction(0))) for expression in domain]
        except Unreadable:
            return False
        return all(sign is not None and sign >= 0 for sign in signs)

    def _tolerates(
        self, left: Expression, right: Expression, first: Quotient, second: Quotient, atoms: Mapping[str, Atom]
    ) -> bool:
        conventions = self.conventions
        if conventions.decimals == "exact" and not conventions.relative_tolerance:
            return False
        ends = [enclosure(value, atoms, _TOLERANCE_BITS) for value in (first, second)]
        if ends[0] is None or ends[1] is None:
            return False
        (low, high), (other_low, other_high) = ends[0], ends[1]
        distance = max(abs(high - other_low), abs(other_high - low))
        size = max(abs(low), abs(other_low))
        if distance <= Fraction(conventions.relative_tolerance) * size:
            return True
        if conventions.decimals == "exact":
            return False
        literals = [_decimal(side) for side in (left, right)]
        steps = [_step(literal, conventions.rounded_digits) for literal in literals if literal is not None]
        return any(step is not None and distance <= step / 2 for step in steps)


def _infinity(expression: Expression) -> int:
    """1 and -1 for the infinities, else 0."""
    if expression == Name("infinity"):
        return 1
    if isinstance(expression, Apply) and expression.function == "neg":
        return -_infinity(expression.arguments[0])
    if isinstance(expression, Apply) and any(_infinity(argument) for argument in expression.arguments):
        raise Unreadable("arithmetic with infinity")
    return 0


def _variables(keys: set[str], atoms: Mapping[str, Atom]) -> set[str]:
    """The variables in atoms, at any depth."""
    found: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        atom = atoms[key]
        if atom.kind == "variable":
            found.add(key)
        for argument in atom.arguments:
            for polynomial in (argument.numerator, argument.denominator):
                waiting += [inner for monomial in polynomial for inner, _ in monomial]
    return found


def _point(variables: list[str], number: int) -> dict[str, Fraction]:
    """Fixed rational values: positive below 1 and above, and one negative."""
    sign = -1 if number == _POINTS - 1 else 1
    return {
        name: sign * Fraction(7 + 4 * place + 6 * number, 3 + (5 * place + 11 * number) % 17)
        for place, name in enumerate(variables)
    }


def _decimal(expression: Expression) -> Number | None:
    if isinstance(expression, Apply) and expression.function == "neg":
        return _decimal(expression.arguments[0])
    return expression if isinstance(expression, Number) and expression.places else None


def _step(literal: Number, digits: int) -> Fraction | None:
    """One unit of a decimal's last place, if it has that many significant digits."""
    assert literal.places is not None
    step = Fraction(1, 10**literal.places)
    return step if abs(literal.value) >= step * 10 ** (digits - 1) else None
