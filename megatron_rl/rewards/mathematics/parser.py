r"""Expressions from their spelling after `cleaning`: LaTeX, and plain text such as 3*x^2 or sqrt(2)/2.

Recursive descent over the characters. What has two readings that differ is refused: 1/2x, \frac{1}{2}^{3}^{2}, 0x10.
Implicit products are read as mathematicians do: 2x, x(x+1), \sin 2x + 1. An integer before a fraction of integers is a
mixed number, as answers use it. Lengths and depths are limited; time is linear in the text.
"""

import re
from fractions import Fraction

from megatron_rl.rewards.mathematics.expression import Apply, Expression, Name, Number, Unreadable

MAX_CHARACTERS = 2000
MAX_DEPTH = 40
MAX_DIGITS = 2000

_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.\d+|\d+|\.\d+", re.ASCII)
_LISTED_NUMBER = re.compile(r"\d+\.\d+|\d+|\.\d+", re.ASCII)
_RECURRING = re.compile(r"(\d{0,20})\.(\d{0,20})\s*\\(?:overline|bar|dot)\s*\{?(\d{1,20})\}?", re.ASCII)
_SCIENTIFIC = re.compile(r"[eE][-+]?\d{1,4}(?![\w.])", re.ASCII)
_PLAIN_FRACTION = re.compile(r" +(\d+) */ *(\d+)(?![\d.]|\s*[\w(\\^])", re.ASCII)
_LATEX_FRACTION = re.compile(r"\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", re.ASCII)
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_SUBSCRIPT = re.compile(r"_(?:\{([A-Za-z0-9,]+)\}|([A-Za-z0-9]))")
_FUNCTIONS = frozenset(
    "arcsin arccos arctan sinh cosh tanh sin cos tan sec csc cot ln log lg exp sqrt abs floor ceil asin "  # noqa: SIM905
    "acos atan".split()
)
_WORD_FUNCTION = re.compile(rf"({'|'.join(sorted(_FUNCTIONS, key=lambda name: (-len(name), name)))})(?![a-z])")
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "  # noqa: SIM905
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar".split()
)
_CALLED = frozenset("fgh")
"""Letters that before a bracket are functions, and no factors."""


def parse(text: str, *, separates: bool = False) -> Expression:
    """The expression that a cleaned text is.

    Args:
        separates: whether commas separate, as within brackets, so that 1,234 is no number.

    Raises:
        Unreadable: it is none, or has two readings, or exceeds the limits.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable("too long")
    parser = _Parser(text, separates)
    expression = parser.sum()
    if parser.rest():
        raise Unreadable(f"unexpected {parser.rest()[:20]!r}")
    return expression


def _recurring(whole: str, head: str, period: str) -> Number:
    """0.1 with a bar over 6 is 1/6."""
    value = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(head))
    return Number(value + Fraction(f"{whole or 0}.{head or 0}"))


class _Parser:
    def __init__(self, text: str, separates: bool) -> None:
        self._text, self._at, self._depth, self._bars = text, 0, 0, 0
        self._number = _LISTED_NUMBER if separates else _NUMBER

    def rest(self) -> str:
        return self._text[self._at :].strip()

    def sum(self) -> Expression:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("too deep")
        terms = [self._signed_product()]
        while (sign := self._take("+", "-", "\\pm", "\\mp")) is not None:
            term = self._product()
            if sign == "\\mp":
                raise Unreadable("\\mp")
            if sign == "\\pm":
                term = Apply("plus_minus", (term,))
            terms.append(Apply("neg", (term,)) if sign == "-" else term)
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Apply("add", tuple(terms))

    def _signed_product(self) -> Expression:
        sign = self._take("+", "-", "\\pm")
        if sign is None:
            return self._product()
        term = self._signed_product() if self._peek() in ("-", "+") else self._product()
        return Apply({"-": "neg", "\\pm": "plus_minus"}[sign], (term,)) if sign != "+" else term

    def _product(self) -> Expression:
        left = self._power()
        while True:
            operator = self._take("*", "/", "\\bmod")
            if operator == "\\bmod":
                raise Unreadable("mod")
            if operator is not None:
                right = Apply("neg", (self._power(),)) if self._take("-") else self._power()
                if operator == "/" and self._starts_operand(self._peek()):
                    raise Unreadable("a/bc has two readings")
                left = Apply("mul" if operator == "*" else "div", (left, right))
            elif self._starts_operand(self._peek()):
                if (self._peek() or "") in "0123456789.":  # x2, 3.5.1, two numbers side by side
                    raise Unreadable("a number after its factor")
                right = self._power()
                left = Apply("mul", (left, right))
            else:
                return left

    def _starts_operand(self, next_: str | None) -> bool:
        if next_ is None or next_ in ")]},;:+-*/^=<>!%'_&":
            return False
        if next_ == "|":
            return not self._bars
        if next_ == "\\":
            match = _COMMAND.match(self._text, self._at)
            return match is not None and match[1] not in ("pm", "mp", "cup", "cap", "in", "text", "rfloor", "rceil")
        return next_.isalnum() or next_ in "({.["

    def _power(self) -> Expression:
        base = self._postfixed(self._atom())
        if not self._take("^"):
            return base
        if self._degrees():
            return self._postfixed(Apply("degrees", (base,)))
        exponent = self._exponent()
        if self._peek() == "^":
            raise Unreadable("two exponents")
        return self._postfixed(Apply("pow", (base, exponent)))

    def _degrees(self) -> bool:
        for spelling in ("\\circ", "{\\circ}", "{ \\circ }"):
            if self._text.startswith(spelling, self._at):
                self._at += len(spelling)
                return True
        return False

    def _exponent(self) -> Expression:
        if self._take("-"):
            return Apply("neg", (self._postfixed(self._atom()),))
        if self._peek() == "{" or self._peek() == "(":
            return self._atom()
        return self._postfixed(self._atom())

    def _postfixed(self, base: Expression) -> Expression:
        while True:
            next_ = self._peek()
            if next_ == "!" and not self._text.startswith("!=", self._at):
                self._at += 1
                if self._peek() == "!":
                    raise Unreadable("double factorial")
                base = Apply("factorial", (base,))
            elif next_ == "%":
                self._at += 1
                base = Apply("percent", (base,))
            else:
                return base

    def _atom(self) -> Expression:
        next_ = self._peek()
        if next_ is None:
            raise Unreadable("an operand is missing")
        if next_.isdigit() or next_ == ".":
            return self._literal()
        for opening, closing in (("(", ")"), ("{", "}"), ("[", "]")):
            if next_ == opening:
                return self._bracketed(opening, closing)
        if next_ == "|":
            self._at += 1
            self._bars += 1
            inner = self.sum()
            self._expect("|")
            self._bars -= 1
            return Apply("abs", (inner,))
        if next_ == "\\":
            return self._command()
        word = _WORD_FUNCTION.match(self._text, self._at)
        if word:
            self._at = word.end()
            return self._function(_ALIASES.get(word[1], word[1]))
        if next_.isalpha() and next_.isascii():
            return self._letter()
        raise Unreadable(f"unexpected {next_!r}")

    def _bracketed(self, opening: str, closing: str) -> Expression:
        self._expect(opening)
        bars, self._bars = self._bars, 0
        inner = self.sum()
        self._bars = bars
        self._expect(closing)
        return inner

    def _literal(self) -> Expression:
        recurring = _RECURRING.match(self._text, self._at)
        if recurring:
            self._at = recurring.end()
            return _recurring(*recurring.groups())
        match = self._number.match(self._text, self._at)
        if match is None or len(match[0]) > MAX_DIGITS:
            raise Unreadable("no number")
        self._at = match.end()
        literal = match[0].replace(",", "")
        if self._text.startswith(".", self._at) and not self._text.startswith("..", self._at):
            self._at += 1  # '5.' is 5
            if self._text[self._at : self._at + 1].isalnum() or self._text[self._at : self._at + 1] in ("(", "\\"):
                raise Unreadable("two points in a number")
        value = Fraction(literal)
        places = len(literal.partition(".")[2]) if "." in literal else None
        scientific = _SCIENTIFIC.match(self._text, self._at)
        if scientific:
            self._at = scientific.end()
            return Number(value * Fraction(10) ** int(scientific[0][1:]), None if places is None else places)
        if literal == "0" and self._text[self._at : self._at + 1].isalpha():
            raise Unreadable("0x, 0b: a program's number")
        base = _SUBSCRIPT.match(self._text, self._at)
        if base:
            self._at = base.end()
            return self._in_base(literal, base[1] or base[2])
        if places is None:
            fraction = _PLAIN_FRACTION.match(self._text, self._at) or _LATEX_FRACTION.match(self._text, self._at)
            if fraction:
                top, bottom = (int(group) for group in fraction.groups() if group is not None)
                if 0 < top < bottom:
                    self._at = fraction.end()
                    return Number(value + Fraction(top, bottom))
                raise Unreadable("a number before a fraction that is not below 1")
        return Number(value, places)

    @staticmethod
    def _in_base(literal: str, base: str) -> Expression:
        if not base.isdigit() or not 2 <= int(base) <= 36:
            raise Unreadable("a number with a subscript that is no base")
        try:
            return Number(Fraction(int(literal, int(base))))
        except ValueError as error:
            raise Unreadable("digits beyond the base") from error

    def _letter(self) -> Expression:
        name = self._text[self._at]
        self._at += 1
        return self._named(name)

    def _named(self, name: str) -> Expression:
        subscript = _SUBSCRIPT.match(self._text, self._at)
        if subscript:
            self._at = subscript.end()
            name = f"{name}_{subscript[1] or subscript[2]}"
        while self._text.startswith("'", self._at):
            self._at += 1
            name += "'"
        if name in _CALLED and self._peek() == "(":
            return Apply(f"function {name}", (self._bracketed("(", ")"),))
        if name in _CALLED and self._text.startswith("^{-1}(", self._at):
            self._at += len("^{-1}")
            return Apply(f"inverse {name}", (self._bracketed("(", ")"),))
        return Name(name)

    def _command(self) -> Expression:
        match = _COMMAND.match(self._text, self._at)
        if match is None:
            raise Unreadable(f"unexpected {self._text[self._at : self._at + 2]!r}")
        name = match[1]
        self._at = match.end()
        if name == "frac":
            return Apply("div", (self._argument(), self._argument()))
        if name == "binom":
            return Apply("binom", (self._argument(), self._argument()))
        if name == "sqrt":
            return self._root()
        if name in ("pi", "infty"):
            return Name({"pi": "pi", "infty": "infinity"}[name])
        if name in ("lfloor", "lceil"):
            inner = self.sum()
            self._expect("\\rfloor" if name == "lfloor" else "\\rceil")
            return Apply("floor" if name == "lfloor" else "ceil", (inner,))
        if name in _FUNCTIONS:
            return self._function(_ALIASES.get(name, name))
        if name in _GREEK:
            return self._named(name)
        if name in ("overline", "bar", "dot"):
            raise Unreadable(f"\\{name}")
        raise Unreadable(f"unknown \\{name}")

    def _root(self) -> Expression:
        index: Expression = Number(Fraction(2))
        if self._peek() == "[":
            index = self._bracketed("[", "]")
        return Apply("root", (self._argument(), index))

    def _argument(self) -> Expression:
        r"""Of \frac and \sqrt: a group, or one character: \frac12."""
        next_ = self._peek()
        if next_ is not None and next_.isdigit():
            self._at += 1
            return Number(Fraction(int(next_)))
        return self._atom()

    def _function(self, name: str) -> Expression:
        if name == "sqrt":
            return self._root()
        exponent: Expression | None = None
        base: tuple[Expression, ...] = ()
        if name == "log" and self._take("_"):
            base = (self._argument(),)
        if self._take("^"):
            exponent = self._exponent()
            if exponent in (Apply("neg", (Number(Fraction(1)),)), Number(Fraction(-1))):
                if name not in ("sin", "cos", "tan"):
                    raise Unreadable("an inverse of a function")
                name, exponent = f"arc{name}", None
        argument = self._bracketed("(", ")") if self._peek() == "(" else self._bare_argument()
        applied = Apply(name, (argument, *base))
        return applied if exponent is None else Apply("pow", (applied, exponent))

    def _bare_argument(self) -> Expression:
        """Factors without signs between them: of sin 2x cos x, the 2x."""
        factors = [self._power()]
        while self._starts_operand(self._peek()) and not self._starts_function():
            factors.append(self._power())
        argument = factors[0]
        for factor in factors[1:]:
            argument = Apply("mul", (argument, factor))
        return argument

    def _starts_function(self) -> bool:
        command = _COMMAND.match(self._text, self._at)
        return (command is not None and command[1] in _FUNCTIONS) or bool(_WORD_FUNCTION.match(self._text, self._at))

    def _peek(self) -> str | None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at] if self._at < len(self._text) else None

    def _take(self, *spellings: str) -> str | None:
        self._peek()
        for spelling in spellings:
            if self._text.startswith(spelling, self._at):
                self._at += len(spelling)
                return spelling
        return None

    def _expect(self, spelling: str) -> None:
        if self._take(spelling) is None:
            raise Unreadable(f"{spelling!r} is missing")
