"""From expressions to their normal form: the rules of powers, roots, logarithms and functions.

Rules hold wherever both sides are defined as reals, or are not used: sqrt(x^2) is |x|, sqrt(x y) stays a root of its
own, a^(n+1) is a^n a. Odd roots of negative numbers are real, as in school.
"""

import math
from fractions import Fraction

from megatron_rl.rewards.mathematics.expression import Expression, Name, Number, Unreadable
from megatron_rl.rewards.mathematics.normal_form import (
    ONE,
    Algebra,
    Atom,
    Monomial,
    Polynomial,
    Quotient,
    TooLarge,
    constant,
    content,
    key_of,
    rational,
)

MAX_FACTORIAL = 3000
MAX_INDEX = 64
"""Of a root."""
_TRIAL_DIVISORS = 10_000

_HALF = Fraction(1, 2)
# cos(pi * turn) squared and its sign, of the angles whose cosine is a root of a rational
_COSINES = {
    Fraction(0): Fraction(1),
    Fraction(1, 6): Fraction(3, 4),
    Fraction(1, 4): _HALF,
    Fraction(1, 3): Fraction(1, 4),
    _HALF: Fraction(0),
}


class Reduction:
    """Turns expressions into quotients of one algebra."""

    def __init__(self, *, log_base: str | None = None) -> None:
        self.algebra = Algebra()
        self._log_base = log_base

    def quotient(self, expression: Expression) -> Quotient:
        """The normal form of an expression.

        Raises:
            Unreadable: it is undefined (1/0), or has no single value (+-2).
            TooLarge: it exceeds the limits.
        """
        if isinstance(expression, Number):
            return self.algebra.rational(expression.value)
        if isinstance(expression, Name):
            if expression.name == "infinity":
                raise Unreadable("infinity is no number")
            kind = "constant" if expression.name in ("pi", "e", "i") else "variable"
            return self.algebra.atom(expression.name, Atom(kind))
        return self._apply(expression.function, expression.arguments)

    def _apply(self, function: str, arguments: tuple[Expression, ...]) -> Quotient:
        algebra = self.algebra
        values = [self.quotient(argument) for argument in arguments]
        first = values[0]
        if function == "add":
            for value in values[1:]:
                first = algebra.add(first, value)
            return algebra.reduced(first.numerator, first.denominator)
        if function == "mul":
            return algebra.multiply(first, values[1])
        if function == "div":
            return algebra.divide(first, values[1])
        if function == "neg":
            return algebra.negate(first)
        if function == "percent":
            return algebra.multiply(first, algebra.rational(Fraction(1, 100)))
        if function == "degrees":
            return algebra.multiply(first, algebra.multiply(self._pi(), algebra.rational(Fraction(1, 180))))
        if function == "pow":
            return self.power(first, values[1])
        if function == "root":
            return self._root(first, values[1])
        if function == "exp":
            return self.power(self.quotient(Name("e")), first)
        if function in ("ln", "log"):
            return self._logarithm(function, values)
        if function in ("factorial", "binom", "floor", "ceil", "abs"):
            return self._integer_function(function, values)
        if function == "plus_minus":
            raise Unreadable("two values")
        return self._trigonometric(function, first)

    def _pi(self) -> Quotient:
        return self.quotient(Name("pi"))

    def _of(self, function: str, *arguments: Quotient) -> Quotient:
        """The atom function(arguments)."""
        key = f"{function}({', '.join(map(key_of, arguments))})"
        return self.algebra.atom(key, Atom(function, arguments))

    # Powers and roots

    def power(self, base: Quotient, exponent: Quotient) -> Quotient:
        """base ** exponent; of a real power of a sum, and of a symbolic one, an atom."""
        number = exponent.constant
        if number is not None:
            if number.denominator == 1:
                if number == 0 and not base.numerator:
                    raise Unreadable("0^0")
                return self.algebra.integer_power(base, int(number))
            if number.denominator > MAX_INDEX:
                raise TooLarge("an exponent with a large denominator")
            root = self.root(base, number.denominator)
            return self.algebra.integer_power(root, number.numerator)
        if base.constant == 1:
            return base
        below = rational(exponent.denominator)
        if below is None:  # a quotient as exponent: an atom as a whole
            return self._symbolic_power(base, exponent)
        result = self.algebra.rational(1)
        for monomial, factor in exponent.numerator.items():
            factor /= below
            if monomial == ONE:
                part = self.power(base, self.algebra.rational(factor))
            else:
                part = self._monomial_power(base, monomial, factor)
            result = self.algebra.multiply(result, part)
        return result

    def _monomial_power(self, base: Quotient, monomial: Monomial, factor: Fraction) -> Quotient:
        inner = self.algebra.atoms[monomial[0][0]]
        if _is_e(base) and len(monomial) == 1 and monomial[0][1] == 1 and inner.kind == "ln":
            return self.power(inner.arguments[0], self.algebra.rational(factor))  # e^(c ln a) = a^c
        if _is_e(base) and ("i", 1) in monomial:  # Euler: e^(i t) = cos t + i sin t
            rest = tuple(power for power in monomial if power != ("i", 1))
            angle = Quotient({rest: factor}, constant(1))
            sine = self.algebra.multiply(self.quotient(Name("i")), self._trigonometric("sin", angle))
            return self.algebra.add(self._trigonometric("cos", angle), sine)
        value = base.constant
        if value is not None and value > 0 and value != 1:  # 4^n = (2^n)^2
            result = self.algebra.rational(1)
            for prime, times in _factors(value):
                part = self._symbolic_power(
                    self.algebra.rational(prime), Quotient({monomial: Fraction(1)}, constant(1))
                )
                result = self.algebra.multiply(result, self.power(part, self.algebra.rational(factor * times)))
            return result
        part = self._symbolic_power(base, Quotient({monomial: Fraction(1)}, constant(1)))
        return self.power(part, self.algebra.rational(factor))

    def _symbolic_power(self, base: Quotient, exponent: Quotient) -> Quotient:
        return self._of("power", base, exponent)

    def _root(self, radicand: Quotient, index: Quotient) -> Quotient:
        number = index.constant
        if number is None or number.denominator != 1 or not 2 <= number <= MAX_INDEX:
            raise Unreadable("a root with such an index")
        return self.root(radicand, int(number))

    def root(self, radicand: Quotient, index: int) -> Quotient:
        """The real index-th root; the imaginary one of a negative number, with index 2."""
        top, bottom = radicand.numerator, radicand.denominator
        algebra = self.algebra
        if rational(bottom) is None:  # root(a/b) = root(a b^(k-1)) / b, where b > 0 or k is odd; else / |b|
            below = Quotient(bottom, constant(1))
            lifted = algebra.product(top, algebra.integer_power(below, index - 1).numerator)
            if index % 2 == 0 and (rational(top) or 0) <= 0:
                below = self._integer_function("abs", [below])
            return algebra.divide(self._polynomial_root(lifted, index), below)
        return self._polynomial_root(algebra.reduced(top, bottom).numerator, index)

    def _polynomial_root(self, polynomial: Polynomial, index: int) -> Quotient:
        algebra = self.algebra
        if not polynomial:
            return algebra.rational(0)
        outside = content(polynomial)
        inner = {monomial: factor / outside for monomial, factor in polynomial.items()}
        result = self._rational_root(outside, index)
        if len(inner) == 1:
            ((monomial, sign),) = inner.items()
            if monomial == ONE and sign > 0:
                return result
            if sign < 0 and index % 2:
                inner, result = {monomial: Fraction(1)}, algebra.negate(result)
            elif sign < 0 and monomial == ONE:
                if index != 2:
                    raise Unreadable("an even root of a negative number")
                return algebra.multiply(result, self.quotient(Name("i")))
            if inner == {ONE: 1}:
                return result
            if next(iter(inner.values())) == 1:
                split = self._monomial_root(monomial, index)
                if split is not None:
                    return algebra.multiply(result, split)
        key = key_of(Quotient(inner, constant(1)))
        atom = Atom("root", (Quotient(inner, constant(1)),), index=index)
        return algebra.multiply(result, algebra.atom(f"root{index}({key})", atom))

    def _monomial_root(self, monomial: Monomial, index: int) -> Quotient | None:
        """The root of a product of atoms, factor by factor; None where their signs could differ."""
        unknown = [key for key, _ in monomial if not self._is_positive(key)]
        if len(unknown) > 1 or any(key == "i" for key, _ in monomial):
            return None
        exponents: dict[str, Fraction] = {}
        for key, exponent in monomial:
            atom = key
            is_even = exponent.denominator % 2 == 1 and exponent.numerator % 2 == 0
            if key in unknown and index % 2 == 0 and is_even:  # sqrt(x^2) = |x|
                argument = Quotient({((key, Fraction(1)),): Fraction(1)}, constant(1))
                ((((atom, _),), _),) = self._of("abs", argument).numerator.items()
            exponents[atom] = exponents.get(atom, Fraction(0)) + exponent / index
        return Quotient(self.algebra.simplify(exponents, Fraction(1)), constant(1))

    def _is_positive(self, key: str) -> bool:
        atom = self.algebra.atoms[key]
        if atom.kind == "root" and atom.index % 2 == 0:
            return True
        if atom.kind == "power":
            base = atom.arguments[0]
            return _is_e(base) or (base.constant or 0) > 0
        return atom.kind in ("prime", "constant", "abs")

    def _rational_root(self, value: Fraction, index: int) -> Quotient:
        exponents: dict[str, Fraction] = {}
        outside = Fraction(1)
        for prime, times in _factors(value):
            whole, left = divmod(times, index)
            outside *= Fraction(prime) ** whole
            if left:
                self.algebra.atoms[f"{prime}"] = Atom("prime", number=prime)
                exponents[f"{prime}"] = Fraction(left, index)
        return Quotient({tuple(sorted(exponents.items())): outside}, constant(1))

    # Logarithms and the rest

    def _logarithm(self, function: str, values: list[Quotient]) -> Quotient:
        if function == "log" and len(values) == 1:
            if self._log_base is None:
                return self._of("log", values[0])
            if self._log_base == "10":
                values = [values[0], self.algebra.rational(10)]
        if len(values) == 2:
            return self.algebra.divide(self._ln(values[0]), self._ln(values[1]))
        return self._ln(values[0])

    def _ln(self, value: Quotient) -> Quotient:
        algebra = self.algebra
        if len(value.numerator) != 1 or len(value.denominator) != 1:
            return self._of("ln", value)
        total = algebra.rational(0)
        for polynomial, sign in ((value.numerator, 1), (value.denominator, -1)):
            ((monomial, factor),) = polynomial.items()
            kinds = [algebra.atoms[key].kind for key, _ in monomial]
            if factor <= 0 or any(kind not in ("prime", "constant") for kind in kinds) or ("i", 1) in monomial:
                if rational(polynomial) is not None and factor <= 0:
                    raise Unreadable("a logarithm of a number that is not positive")
                return self._of("ln", value)
            for key, exponent in monomial:
                part = algebra.rational(1) if key == "e" else self._ln_atom(key)
                total = algebra.add(total, algebra.multiply(algebra.rational(exponent * sign), part))
            for prime, times in _factors(factor):
                self.algebra.atoms[f"{prime}"] = Atom("prime", number=prime)
                total = algebra.add(
                    total, algebra.multiply(algebra.rational(times * sign), self._of("ln", algebra.rational(prime)))
                )
        return total

    def _ln_atom(self, key: str) -> Quotient:
        atom = self.algebra.atoms[key]
        if atom.kind == "prime":
            return self._of("ln", self.algebra.rational(atom.number))
        return self._of("ln", Quotient({((key, Fraction(1)),): Fraction(1)}, constant(1)))

    def _integer_function(self, function: str, values: list[Quotient]) -> Quotient:
        numbers = [value.constant for value in values]
        number = numbers[0]
        if any(value is None for value in numbers) or number is None:
            if function == "abs":
                return self._absolute(values[0])
            return self._of(function, *values)
        if function == "abs":
            return self.algebra.rational(abs(number))
        if function in ("floor", "ceil"):
            return self.algebra.rational(math.floor(number) if function == "floor" else math.ceil(number))
        if any(value is None or value.denominator != 1 or value < 0 for value in numbers):
            raise Unreadable(f"{function} of a number that is no natural one")
        if number > MAX_FACTORIAL:
            raise TooLarge(f"{function} of a large number")
        if function == "factorial":
            return self.algebra.rational(math.factorial(int(number)))
        return self.algebra.rational(math.comb(int(number), int(numbers[1] or 0)))

    def _absolute(self, value: Quotient) -> Quotient:
        """|value|, where its sign is not that of a rational."""
        if _leads_negative(value):
            value = self.algebra.negate(value)
        positive = all(
            len(polynomial) == 1
            and next(iter(polynomial.values())) > 0
            and all(key != "i" and (self._is_positive(key) or power % 2 == 0) for key, power in next(iter(polynomial)))
            for polynomial in (value.numerator, value.denominator)
        )
        return value if positive else self._of("abs", value)

    def _trigonometric(self, function: str, value: Quotient) -> Quotient:
        algebra = self.algebra
        one = algebra.rational(1)
        inverse = {"sec": "cos", "csc": "sin"}.get(function)
        if inverse is not None:
            return algebra.divide(one, self._trigonometric(inverse, value))
        if function in ("tan", "cot"):
            sine, cosine = (self._trigonometric(name, value) for name in ("sin", "cos"))
            return algebra.divide(sine, cosine) if function == "tan" else algebra.divide(cosine, sine)
        if function in ("sin", "cos"):
            turn = algebra.divide(value, self._pi()).constant
            exact = None if turn is None else self._cosine(turn if function == "cos" else _HALF - turn)
            if exact is not None:
                return exact
            if _leads_negative(value):
                even = self._of(function, algebra.negate(value))
                return even if function == "cos" else algebra.negate(even)
        if function in ("arcsin", "arctan") and _leads_negative(value):
            return algebra.negate(self._trigonometric(function, algebra.negate(value)))
        exact = self._inverse(function, value)
        return self._of(function, value) if exact is None else exact

    def _cosine(self, turn: Fraction) -> Quotient | None:
        """cos(pi turn), where it is the root of a rational."""
        turn = abs(turn) % 2
        turn = 2 - turn if turn > 1 else turn
        sign, turn = (-1, 1 - turn) if turn > _HALF else (1, turn)
        if turn not in _COSINES:
            return None
        root = self.root(self.algebra.rational(_COSINES[turn]), 2)
        return root if sign > 0 else self.algebra.negate(root)

    def _inverse(self, function: str, value: Quotient) -> Quotient | None:
        """arcsin, arccos, arctan where it is a known part of pi; the value of arcsin and arctan is not negative."""
        square = self.algebra.multiply(value, value).constant
        if square is None or function not in ("arcsin", "arccos", "arctan"):
            return None
        if function == "arctan":  # cos^2 = 1 / (1 + tan^2)
            cosine_squared = 1 / (1 + square)
        else:
            cosine_squared = 1 - square if function == "arcsin" else square
        turn = next((turn for turn, known in _COSINES.items() if known == cosine_squared), None)
        if turn is None:
            return None
        if function == "arccos" and _leads_negative(value):
            turn = 1 - turn
        return self.algebra.multiply(self.algebra.rational(turn), self._pi())


def _is_e(value: Quotient) -> bool:
    return value.numerator == {(("e", Fraction(1)),): 1} and rational(value.denominator) == 1


def _leads_negative(value: Quotient) -> bool:
    return bool(value.numerator) and value.numerator[min(value.numerator)] < 0


def _factors(value: Fraction) -> list[tuple[int, int]]:
    """Primes and exponents of a positive rational; what trial division leaves is taken as a prime."""
    found: dict[int, int] = {}
    for number, sign in ((value.numerator, 1), (value.denominator, -1)):
        if number.bit_length() > 4096:
            raise TooLarge("a root of a number with too many digits")
        divisor = 2
        while divisor * divisor <= number and divisor < _TRIAL_DIVISORS:
            while number % divisor == 0:
                found[divisor] = found.get(divisor, 0) + sign
                number //= divisor
            divisor += 1 if divisor == 2 else 2
        for times in (3, 2) if divisor >= _TRIAL_DIVISORS else ():
            root = _integer_root(number, times)
            if root**times == number:
                found[root] = found.get(root, 0) + sign * times
                number = 1
        if number > 1:
            found[number] = found.get(number, 0) + sign
    return sorted(found.items())


def _integer_root(number: int, index: int) -> int:
    if index == 2:
        return math.isqrt(number)
    low, high = 1, 1 << (number.bit_length() // index + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**index <= number else (low, middle - 1)
    return low
