r"""Numeric answers, with what models write and what they try."""

import random
from fractions import Fraction

import pytest

from megatron_rl.rewards.answers import EXTRACTIONS, exact_match, is_number, numbers, numeric_answer

F = Fraction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no digits", []),
        ("72", [72]),
        ("It is 72.", [72]),
        ("72...", [72]),
        ("-0", [0]),
        ("-0.0", [0]),
        ("+5", [5]),
        ("3.0", [3]),
        ("007", [7]),
        (".5", [F(1, 2)]),
        ("wait...5", [5]),
        ("1,234", [1234]),
        ("1,234,567.25", [F("1234567.25")]),
        ("1,2,3", [1, 2, 3]),
        ("1,23", [1, 23]),
        ("1,2345", [1, 2345]),
        ("1.2.3", [F("1.2")]),
        ("$72", [72]),
        ("\\$72", [72]),
        ("-$5 and $-5", [-5, -5]),
        ("20$, 20€, 50%", [20, 20, 50]),
        ("12-7", [12, 7]),
        ("12 - 7", [12, 7]),
        ("12+7=19", [12, 7, 19]),
        ("5-12=-7", [5, 12, -7]),
        ("(-3)", [-3]),
        ("(2)-3", [2, 3]),
        ("x-5", [5]),
        ("\u22125", [-5]),
        ("x2 H2O a_1", []),
        ("5kg, 3rd", [5, 3]),
        ("答案是5。", [5]),
        ("2^10", [2, 10]),
        ("1e3", [1000]),
        ("2.5E-1", [F(1, 4)]),
        ("3em", [3]),
        ("3/4", [F(3, 4)]),
        ("-1/2", [F(-1, 2)]),
        ("0.5/2", [F(1, 4)]),
        ("1/0", [1, 0]),
        ("1/2/3", [1, F(2, 3)]),
        ("1/2.5", [1, F(5, 2)]),
        ("\\frac{1}{2} -\\dfrac{3}{4}", [F(1, 2), F(-3, 4)]),
        ("1{,}234 and 1\\,234", [1234, 1234]),
        ("\u0663", []),  # an Arabic-Indic digit, which int() would read
        ("9" * 1001, [None]),
        ("nan inf Infinity", []),
        ("0x10 1_000", [0, 1]),  # the rest of either is inside a word
    ],
)
def test_numbers(text: str, expected: list[Fraction | None]) -> None:
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("extract", "completion", "correct"),
    [
        ("last_number", "First 5, then 72.", True),
        ("last_number", "72, or perhaps 5", False),
        ("last_number", "48+24=72", True),
        ("last_number", "#### 72\nchecked 2 times", False),
        ("last_number", "seventy-two", False),
        ("last_number", "72 " + "9" * 5000, False),
        ("hash", "so\n#### 72", True),
        ("hash", "#### 5\n#### 72", True),
        ("hash", "#### 72\n#### 5", False),
        ("hash", "####72 apples", True),
        ("hash", "#### $72.00", True),
        ("hash", "#### 72 or 5", False),
        ("hash", "#### 72 72", False),
        ("hash", "####\n72", False),
        ("hash", "72", False),
        ("boxed", "\\boxed{72}", True),
        ("boxed", "\\boxed{\\text{\\$72}}", True),
        ("boxed", "\\boxed{\\frac{144}{2}}", True),
        ("boxed", "\\boxed{5} no: \\boxed{72}", True),
        ("boxed", "\\boxed{72} \\boxed{", False),
        ("boxed", "\\boxed{72", False),
        ("boxed", "72", False),
        ("answer_tag", "<answer> 72\n</answer>", True),
        ("answer_tag", "<answer>5</answer><answer>72</answer> 9", True),
        ("answer_tag", "<answer>72", False),
        ("answer_tag", "</answer>72<answer>", False),
        ("auto", "72", True),
        ("auto", "#### 72\nchecked 2 times", True),
        ("auto", "\\boxed{5} #### 72", True),
        ("auto", "#### 5 \\boxed{72}", True),
        ("auto", "<answer>\\boxed{72}</answer>", True),
        ("auto", "#### unknown, 72 maybe\n72", True),  # the mark holds one number
        ("auto", "#### unknown\n72", False),  # the mark decides, and holds none
    ],
)
def test_where_the_answer_is_looked_for(extract: str, completion: str, correct: bool) -> None:
    assert numeric_answer(completion=completion, answer="72", extract=extract) == float(correct)


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("3.0", "3", True),
        ("3", "3.000", True),
        ("0.1", "1/10", True),
        ("0.3", "1/3", False),
        ("0.30000000000000001", "0.3", False),  # equal as floats
        ("1234", "1,234", True),
        ("1,234.", "1234", True),
        ("-0", "0", True),
        ("-7", "7", False),
        ("7", " $7.00 ", True),
        ("50%", "50", True),
        ("", "0", False),
    ],
)
def test_comparison_is_exact(completion: str, answer: str, correct: bool) -> None:
    assert numeric_answer(completion=completion, answer=answer) == float(correct)


@pytest.mark.parametrize("answer", ["", "seven", "1 or 2", None, "9" * 1001])
def test_a_reference_that_is_no_number_is_an_error(answer: str | None) -> None:
    with pytest.raises(ValueError, match="reference answer"):
        numeric_answer(completion="7", answer=answer)


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="extract='box' is unknown; allowed are auto, last_number, hash"):
        numeric_answer(completion="7", answer="7", extract="box")


@pytest.mark.parametrize(
    "unit",
    ["9", "1,111,", "1/", "0", "0/", ".5", "-", "-$", "\\boxed{", "####", "<answer>", "\\frac{1}{", "1e9", "x1"],
)
@pytest.mark.timeout(120)  # 0.1 s for the five rules; a rule of quadratic time takes minutes at this length
def test_no_text_takes_long(unit: str) -> None:
    for extract in EXTRACTIONS:
        assert numeric_answer(completion=unit * 20_000, answer="7", extract=extract) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", True), ("-1,234.5", True), ("1/2", True), ("7 ", False), ("7.", False), ("7 kg", False), ("", False)],
)
def test_is_number_takes_the_whole_text(text: str, expected: bool) -> None:
    assert is_number(text) is expected


def test_exact_match() -> None:
    assert exact_match(completion=" Paris\n", answer="Paris") == 1.0
    assert exact_match(completion="paris", answer="Paris") == 0.0
    assert exact_match(completion="It is Paris", answer="Paris") == 0.0
    assert exact_match(completion="3.0", answer="3") == 0.0
    with pytest.raises(ValueError, match="no reference answer"):
        exact_match(completion="a", answer=None)


def _written(value: Fraction, draw: random.Random) -> str:
    """A number in one of the ways in which models write it."""
    sign = draw.choice(["-", "\u2212", "\u2013", "\uff0d"]) if value < 0 else ""
    over, under = abs(value.numerator), value.denominator
    if under == 1:
        return f"{sign}{draw.choice([str(over), f'{over}.0', f'{over:,}'])}"
    frac = rf"\{draw.choice(['frac', 'dfrac', 'tfrac'])}"
    ways = [f"{over}/{under}", f"{over} / {under}", rf"{frac}{{{over}}}{{{under}}}"]
    if over < 10 and under < 10:
        ways.append(rf"{frac}{over}{under}")
    if over > under:
        whole, rest = divmod(over, under)
        ways += [f"{whole} {rest}/{under}", rf"{whole}{frac}{{{rest}}}{{{under}}}"]
    if sign and draw.random() < 0.3:
        return rf"{frac}{{-{over}}}{{{under}}}"
    return sign + draw.choice(ways)


_UNITS = ("", " cm", r"\text{ cm}^2", " cm^2", r" \mathrm{~m}^{3}", "%", r"\%", r"^\circ", " m\u00b2", " apples")
_AROUND = (r"\sqrt{%s}", r"%s\pi", r"%s^2", r"2^{%s}", r"3 \times %s", r"%s + 1", r"%s or 2", r"\log %s")


@pytest.mark.parametrize("seed", range(300))
def test_a_number_is_read_however_it_is_written_and_no_expression_is_a_number(seed: int) -> None:
    draw = random.Random(seed)
    value = Fraction(draw.randint(-60, 60), draw.randint(1, 12))
    text = _written(value, draw)
    box, tag = r"\boxed{%s}", "<answer>%s</answer>"
    mark = draw.choice((box, tag, "#### %s"))
    given = f"{value.numerator}/{value.denominator}"
    assert numeric_answer(completion=mark % (text + draw.choice(_UNITS)), answer=given) == 1.0, text
    assert numeric_answer(completion=mark % text, answer=f"{value + 1}") == 0.0
    assert numeric_answer(completion=mark % (draw.choice(_AROUND) % text), answer=given) == 0.0, text
    with pytest.raises(ValueError, match="exactly one number"):
        numeric_answer(completion="1", answer=draw.choice(_AROUND) % text)
