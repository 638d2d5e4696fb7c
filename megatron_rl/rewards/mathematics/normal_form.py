"""Expressions as quotients of polynomials over the rationals, in which equality is an identity.

A polynomial maps monomials to coefficients; a monomial is a product of atoms with positive exponents. Atoms are what
arithmetic does not reduce: variables, pi, e, i, roots, logarithms, values of functions. Prime p under a root is an atom
with exponent in (0, 1); the products of such powers are linearly independent over the rationals (Besicovitch, 1940), so
sqrt 8 - 2 sqrt 2 has no term left. Roots of sums are atoms that know what their power is. What this cannot reduce is
left to `intervals`.

Work is limited by counting it, so that the outcome depends on the expressions alone, never on a clock.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from megatron_rl.rewards.mathematics.expression import Unreadable

MAX_WORK = 20_000
"""Products of terms in one comparison; one of long coefficients counts as several."""
MAX_BITS = 200_000
"""Of a coefficient."""
MAX_TERMS = 2_000

Monomial = tuple[tuple[str, Fraction], ...]
"""Atoms in the order of their keys, each with a positive exponent."""
Polynomial = dict[Monomial, Fraction]

ONE: Monomial = ()


class TooLarge(Unreadable):
    """Beyond the limits on work."""


@dataclass(frozen=True)
class Atom:
    """What an atom stands for."""

    kind: str
    """variable, constant, prime, root (of a polynomial), power (base^exponent), or the name of a function."""
    arguments: tuple["Quotient", ...] = ()
    number: int = 0
    """Of a prime."""
    index: int = 1
    """Of a root."""


@dataclass(frozen=True)
class Quotient:
    """numerator / denominator."""

    numerator: Polynomial
    denominator: Polynomial

    @property
    def constant(self) -> Fraction | None:
        """Its value, if it is rational as it stands."""
        top, bottom = rational(self.numerator), rational(self.denominator)
        return None if top is None or bottom is None else top / bottom


def rational(polynomial: Polynomial) -> Fraction | None:
    """The value of a polynomial without atoms."""
    if not polynomial:
        return Fraction(0)
    return polynomial.get(ONE) if len(polynomial) == 1 else None


def constant(value: Fraction | int) -> Polynomial:
    """A rational number."""
    return {ONE: Fraction(value)} if value else {}


class Algebra:
    """Arithmetic of polynomials and quotients, with the atoms of one comparison."""

    def __init__(self) -> None:
        self.atoms: dict[str, Atom] = {}
        self._work = 0

    def atom(self, key: str, atom: Atom) -> Quotient:
        """An atom as a quotient; its key must tell it from all others, and say what it is."""
        self.atoms[key] = atom
        return Quotient({((key, Fraction(1)),): Fraction(1)}, constant(1))

    def rational(self, value: Fraction | int) -> Quotient:
        """A rational number as a quotient."""
        return Quotient(constant(_bounded(Fraction(value))), constant(1))

    def add(self, left: Quotient, right: Quotient) -> Quotient:
        """left + right."""
        if left.denominator == right.denominator:
            return Quotient(self.sum(left.numerator, right.numerator), left.denominator)
        crossed = self.product(left.numerator, right.denominator), self.product(right.numerator, left.denominator)
        return Quotient(self.sum(*crossed), self.product(left.denominator, right.denominator))

    def multiply(self, left: Quotient, right: Quotient) -> Quotient:
        """left * right."""
        return self.reduced(
            self.product(left.numerator, right.numerator), self.product(left.denominator, right.denominator)
        )

    def divide(self, left: Quotient, right: Quotient) -> Quotient:
        """left / right.

        Raises:
            Unreadable: right is 0.
        """
        if not right.numerator:
            raise Unreadable("division by zero")
        return self.multiply(left, Quotient(right.denominator, right.numerator))

    def negate(self, value: Quotient) -> Quotient:
        """-value."""
        return Quotient({monomial: -factor for monomial, factor in value.numerator.items()}, value.denominator)

    def integer_power(self, base: Quotient, exponent: int) -> Quotient:
        """base ** exponent."""
        if exponent < 0:
            if not base.numerator:
                raise Unreadable("division by zero")
            base, exponent = Quotient(base.denominator, base.numerator), -exponent
        if exponent > 1 and max(_bits(base.numerator), _bits(base.denominator)) * exponent > MAX_BITS:
            raise TooLarge("a power with too many digits")
        if exponent > 1 and (len(base.numerator) > 1 or len(base.denominator) > 1) and exponent > MAX_TERMS:
            raise TooLarge("a power with too many terms")
        power = self.rational(1)
        while exponent:
            if exponent & 1:
                power = self.multiply(power, base)
            exponent >>= 1
            base = self.multiply(base, base) if exponent else base
        return power

    def sum(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """left + right."""
        total = dict(left)
        for monomial, factor in right.items():
            value = total.get(monomial, Fraction(0)) + factor
            if value:
                total[monomial] = _bounded(value)
            else:
                total.pop(monomial, None)
        if len(total) > MAX_TERMS:
            raise TooLarge("too many terms")
        return total

    def product(self, left: Polynomial, right: Polynomial) -> Polynomial:
        """left * right."""
        self._spend(len(left) * len(right) * (1 + (_bits(left) + _bits(right)) // 1000))
        total: Polynomial = {}
        for one, first in left.items():
            for other, second in right.items():
                if not one or not other:
                    part = {one or other: _bounded(first * second)}
                else:
                    part = self._monomial(one, other, first * second)
                total = self.sum(total, part) if len(part) != 1 else _accumulate(total, part)
        if len(total) > MAX_TERMS:
            raise TooLarge("too many terms")
        return total

    def _monomial(self, one: Monomial, other: Monomial, factor: Fraction) -> Polynomial:
        exponents = dict(one)
        for key, exponent in other:
            exponents[key] = exponents.get(key, Fraction(0)) + exponent
        return self.simplify(exponents, factor)

    def simplify(self, exponents: Mapping[str, Fraction], factor: Fraction) -> Polynomial:
        """factor * the product of atoms ** exponents, in which whole powers of roots, i and sines are worked out."""
        kept: dict[str, Fraction] = {}
        expanded: list[Polynomial] = []
        for key, exponent in exponents.items():
            atom = self.atoms[key]
            whole, left = divmod(exponent, 1)
            if key == "i":
                factor, left = factor * (-1 if whole % 4 >= 2 else 1), Fraction(whole % 2)
            elif atom.kind == "prime":
                factor *= Fraction(atom.number) ** int(whole)
            elif atom.kind == "root" and exponent >= atom.index:
                times, left = divmod(exponent, atom.index)
                expanded += [atom.arguments[0].numerator] * int(times)
            elif atom.kind == "abs" and exponent >= 2 and rational(atom.arguments[0].denominator) == 1:
                expanded += [atom.arguments[0].numerator] * (2 * int(whole // 2))
                left = exponent - 2 * (whole // 2)
            elif atom.kind == "sin" and exponent >= 2:
                cosine = f"cos({key[4:-1]})"
                self.atoms.setdefault(cosine, Atom("cos", atom.arguments))
                expanded += [{ONE: Fraction(1), ((cosine, Fraction(2)),): Fraction(-1)}] * int(whole // 2)
                left = exponent - 2 * (whole // 2)
            else:
                left = exponent
            if left:
                kept[key] = left
        result: Polynomial = {tuple(sorted(kept.items())): _bounded(factor)} if factor else {}
        for polynomial in expanded:
            result = self.product(result, polynomial)
        return result

    def reduced(self, top: Polynomial, bottom: Polynomial) -> Quotient:
        """top / bottom without common powers of atoms, and with a leading coefficient 1 below."""
        if not top:
            return self.rational(0)
        common = _common_powers([*top, *bottom])
        if common:
            top, bottom = _without(top, common), _without(bottom, common)
        scale = bottom[min(bottom)]
        if scale != 1:
            top = {monomial: factor / scale for monomial, factor in top.items()}
            bottom = {monomial: factor / scale for monomial, factor in bottom.items()}
        return self.rational(1) if top == bottom else Quotient(top, bottom)

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise TooLarge("too much work")


def key_of(value: Quotient) -> str:
    """A text that is equal for equal quotients of the same form."""
    top = _key(value.numerator)
    return top if rational(value.denominator) == 1 else f"[{top}]/[{_key(value.denominator)}]"


def _key(polynomial: Polynomial) -> str:
    if _bits(polynomial) > MAX_TERMS:
        raise TooLarge("too large an argument")
    terms = ("*".join([str(polynomial[m]), *(f"{key}^{exponent}" for key, exponent in m)]) for m in sorted(polynomial))
    text = " + ".join(terms) or "0"
    if len(text) > MAX_TERMS * 10:
        raise TooLarge("too large an argument")
    return text


def _accumulate(total: Polynomial, part: Polynomial) -> Polynomial:
    for monomial, factor in part.items():
        value = total.get(monomial, Fraction(0)) + factor
        if value:
            total[monomial] = value
        else:
            del total[monomial]
    return total


def _common_powers(monomials: list[Monomial]) -> dict[str, Fraction]:
    common = dict(monomials[0])
    for monomial in monomials[1:]:
        if not common:
            break
        exponents = dict(monomial)
        common = {key: min(exponent, exponents[key]) for key, exponent in common.items() if key in exponents}
    return common


def _without(polynomial: Polynomial, common: Mapping[str, Fraction]) -> Polynomial:
    return {
        tuple((key, left) for key, exponent in monomial if (left := exponent - common.get(key, 0))): factor
        for monomial, factor in polynomial.items()
    }


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooLarge("a number with too many digits")
    return value


def _bits(polynomial: Polynomial) -> int:
    return max((max(f.numerator.bit_length(), f.denominator.bit_length()) - 1 for f in polynomial.values()), default=0)


def content(polynomial: Polynomial) -> Fraction:
    """The positive rational by which the coefficients become coprime integers."""
    return Fraction(
        math.gcd(*(factor.numerator for factor in polynomial.values())),
        math.lcm(*(factor.denominator for factor in polynomial.values())),
    )
