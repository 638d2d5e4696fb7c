"""Signs of polynomials whose atoms are numbers: intervals at growing precision, and a bound that makes zero a proof.

Every value is enclosed in an interval with rational-free ends (mpmath's `iv`, rounded outwards). A difference whose
interval excludes 0 is not 0; precision doubles until it does. A difference of radicals that is not 0 exceeds a bound
that its operands give (Burnikel, Funke, Mehlhorn, Schirra, Schmitt, A Separation Bound for Real Algebraic Expressions,
Algorithmica 55, 2009, section 2); once its interval lies below that bound, it is 0. Everything else stays open.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath.ctx_iv import MPIntervalContext
from mpmath.ctx_mp import MPContext

from megatron_rl.rewards.mathematics.normal_form import Atom, Polynomial, Quotient, rational

# contexts of our own, so that nobody else's precision changes, nor ours
iv, mp = MPIntervalContext(), MPContext()

PRECISIONS = (64, 256, 1024, 4096)
"""Bits, one after another."""

_MAX_ARGUMENT = 1_000_000
"""Of exponentials and of sines, whose cost grows with it."""

Point = Mapping[str, Fraction]
"""Values of variables."""


class Undefined(ArithmeticError):
    """No real value, or none that can be enclosed."""


def is_zero(polynomial: Polynomial, atoms: Mapping[str, Atom], point: Point | None = None) -> bool | None:
    """Whether a polynomial is 0 where its variables have the values of `point`; None: not decided.

    An imaginary part is told apart: both parts must be 0. Undefined values leave it open.
    """
    parts = _real_and_imaginary(polynomial)
    answers = [_real_is_zero(part, atoms, point or {}) for part in parts]
    if False in answers:
        return False
    return True if all(answers) else None


def enclosure(value: Quotient, atoms: Mapping[str, Atom], bits: int) -> tuple[Fraction, Fraction] | None:
    """Rational ends of an interval that holds a real number; None: it is undefined or not real."""
    if value.constant is not None:
        return value.constant, value.constant
    if any(key == "i" for polynomial in (value.numerator, value.denominator) for m in polynomial for key, _ in m):
        return None
    try:
        inside = _Evaluation(atoms, {}, bits).quotient(value)
    except (Undefined, ArithmeticError, ValueError):
        return None
    return _fraction(inside.a), _fraction(inside.b)


def _real_and_imaginary(polynomial: Polynomial) -> list[Polynomial]:
    real: Polynomial = {}
    imaginary: Polynomial = {}
    for monomial, factor in polynomial.items():
        exponents = dict(monomial)
        part = imaginary if exponents.pop("i", None) else real
        part[tuple(exponents.items())] = factor
    return [real, imaginary]


def _real_is_zero(polynomial: Polynomial, atoms: Mapping[str, Atom], point: Point) -> bool | None:
    value = rational(polynomial)
    if value is not None:
        return value == 0
    bound = None if point else _separation_bits(polynomial, atoms)
    for bits in PRECISIONS:
        try:
            inside = _Evaluation(atoms, point, bits).polynomial(polynomial)
        except (Undefined, ArithmeticError, ValueError):
            continue  # perhaps too coarse to tell a denominator from 0
        if inside.a > 0 or inside.b < 0:
            return False
        if bound is not None and bound < PRECISIONS[-1]:
            limit = Fraction(1, 1 << bound)
            if -limit < _fraction(inside.a) and _fraction(inside.b) < limit:
                return True
    return None


class _Evaluation:
    """Enclosures at one precision."""

    def __init__(self, atoms: Mapping[str, Atom], point: Point, bits: int) -> None:
        self._atoms, self._point, self._bits = atoms, point, bits
        self._known: dict[str, Any] = {}
        iv.prec = bits

    def quotient(self, value: Quotient) -> Any:
        below = self.polynomial(value.denominator)
        if below.a <= 0 <= below.b:
            raise Undefined("a denominator may be 0")
        return self.polynomial(value.numerator) / below

    def polynomial(self, polynomial: Polynomial) -> Any:
        total = iv.mpf(0)
        for monomial, factor in polynomial.items():
            term = _interval(factor)
            for key, exponent in monomial:
                term = term * self._power(self._atom(key), exponent)
            total = total + term
        return total

    def _power(self, base: Any, exponent: Fraction) -> Any:
        if exponent.denominator == 1:
            return base ** int(exponent)
        return _root(base, exponent.denominator) ** exponent.numerator

    def _atom(self, key: str) -> Any:
        if key not in self._known:
            self._known[key] = self._value(key, self._atoms[key])
        return self._known[key]

    def _value(self, key: str, atom: Atom) -> Any:
        if atom.kind == "prime":
            return iv.mpf(atom.number)
        if key in ("pi", "e"):
            return +iv.pi if key == "pi" else iv.exp(iv.mpf(1))
        if atom.kind == "variable" and key in self._point:
            return _interval(self._point[key])
        if atom.kind == "root":
            return _root(self.quotient(atom.arguments[0]), atom.index)
        function = _FUNCTIONS.get(atom.kind)
        if atom.kind == "power":
            base, exponent = map(self.quotient, atom.arguments)
            if base.a <= 0:
                raise Undefined("a power of a number that is not positive")
            return _exponential(exponent * iv.log(base))
        if function is None:
            raise Undefined(key)
        return function(self.quotient(atom.arguments[0]))


def _interval(value: Fraction) -> Any:
    return iv.mpf(value.numerator) / iv.mpf(value.denominator)


def _fraction(end: Any) -> Fraction:
    sign, mantissa, exponent, _ = mp.mpf(end)._mpf_ if not hasattr(end, "_mpi_") else end._mpi_[0]
    if not mantissa and exponent:
        raise Undefined("infinite")
    value = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return -value if sign else value


def _root(inside: Any, index: int) -> Any:
    if inside.b < 0:
        if index % 2 == 0:
            raise Undefined("an even root of a negative number")
        return -_root(-inside, index)
    if inside.a <= 0:
        if inside.a == inside.b == 0:
            return iv.mpf(0)
        raise Undefined("a root of a number that may be 0")
    return iv.sqrt(inside) if index == 2 else iv.exp(iv.log(inside) / index)


def _exponential(inside: Any) -> Any:
    return iv.exp(_moderate(inside))


def _moderate(inside: Any) -> Any:
    """An argument whose exponential can be computed at all."""
    if max(abs(inside.a), abs(inside.b)) > _MAX_ARGUMENT:
        raise Undefined("a large argument")
    return inside


def _logarithm(inside: Any) -> Any:
    if inside.a <= 0:
        raise Undefined("a logarithm of a number that may not be positive")
    return iv.log(inside)


def _absolute(inside: Any) -> Any:
    if inside.a >= 0:
        return inside
    return -inside if inside.b <= 0 else iv.mpf([0, max(-inside.a.a, inside.b.b)])


def _whole(rounded: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def function(inside: Any) -> Any:
        low, high = (rounded(_fraction(end)) for end in (inside.a, inside.b))
        if low != high:
            raise Undefined("not told from its neighbour")
        return iv.mpf(low)

    return function


def _hyperbolic(name: str) -> Callable[[Any], Any]:
    def function(inside: Any) -> Any:
        up, down = _exponential(inside), _exponential(-inside)
        sine, cosine = (up - down) / 2, (up + down) / 2
        return {"sinh": sine, "cosh": cosine}[name] if name != "tanh" else sine / cosine

    return function


def _monotone(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An enclosure of a monotone function that mpmath has for points alone: the values at the ends, and some more."""

    def enclosed(inside: Any) -> Any:
        with mp.workprec(iv.prec + 20):
            ends = [function(_point(end)) for end in (inside.a, inside.b)]
            if not all(isinstance(end, type(mp.mpf(0))) for end in ends):
                raise Undefined("outside the real domain")
            slack = mp.mpf(2) ** (-iv.prec)
            return iv.mpf([min(ends) - slack, max(ends) + slack])

    return enclosed


def _point(end: Any) -> Any:
    value = _fraction(end)
    return mp.mpf(value.numerator) / value.denominator


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sin": lambda inside: iv.sin(_moderate(inside)),
    "cos": lambda inside: iv.cos(_moderate(inside)),
    "ln": _logarithm,
    "abs": _absolute,
    "floor": _whole(math.floor),
    "ceil": _whole(math.ceil),
    "sinh": _hyperbolic("sinh"),
    "cosh": _hyperbolic("cosh"),
    "tanh": _hyperbolic("tanh"),
    "arctan": _monotone(mp.atan),
    "arcsin": _monotone(mp.asin),
    "arccos": _monotone(mp.acos),
}


def _separation_bits(polynomial: Polynomial, atoms: Mapping[str, Atom]) -> int | None:
    """b such that the value is 0 or its magnitude at least 2^-b; None: not all of its atoms are radicals."""
    degrees: dict[str, int] = {}
    try:
        upper, lower = _bounds(polynomial, atoms, degrees)
    except Undefined:
        return None
    degree = math.prod(degrees.values())
    return math.ceil(lower + upper * (degree - 1)) + 1


def _bounds(polynomial: Polynomial, atoms: Mapping[str, Atom], degrees: dict[str, int]) -> tuple[float, float]:
    """log2 of the paper's u and l; collects the degree of each root."""
    terms = []
    for monomial, factor in polynomial.items():
        upper, lower = _log2(abs(factor.numerator)), _log2(factor.denominator)
        for key, exponent in monomial:
            atom_upper, atom_lower = _atom_bounds(key, atoms[key], exponent.denominator, atoms, degrees)
            upper, lower = upper + atom_upper * exponent.numerator, lower + atom_lower * exponent.numerator
        terms.append((upper, lower))
    total_lower = sum(lower for _, lower in terms)
    largest = max(upper + total_lower - lower for upper, lower in terms)
    return largest + _log2(len(terms)), total_lower


def _atom_bounds(
    key: str, atom: Atom, index: int, atoms: Mapping[str, Atom], degrees: dict[str, int]
) -> tuple[float, float]:
    """Of atom^(1/index), itself perhaps a root."""
    if atom.kind == "prime":
        upper, lower = _log2(atom.number), 0.0
    elif atom.kind in ("root", "abs"):
        upper, lower = _bounds(atom.arguments[0].numerator, atoms, degrees)
        below_upper, below_lower = _bounds(atom.arguments[0].denominator, atoms, degrees)
        upper, lower = upper + below_lower, lower + below_upper
        index *= atom.index
    else:
        raise Undefined(key)
    degrees[key] = math.lcm(degrees.get(key, 1), index)
    if upper >= lower:
        return (upper + (index - 1) * lower) / index, lower
    return upper, ((index - 1) * upper + lower) / index


def _log2(value: int) -> float:
    return math.log2(value) if value else 0.0
