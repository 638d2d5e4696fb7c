"""The verdicts of `compare`: a public table, what is equal or unequal by construction, any text, and GSM8K."""

import inspect
import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rewards.mathematics.comparison import compare
from megatron_rl.rewards.mathematics.conventions import Conventions
from megatron_rl.rewards.mathematics.reward import math_answer, reference_fault
from megatron_rl.rewards.mathematics.verdict import Verdict

CASES = Path(__file__).parent / "math_cases.txt"
GSM8K = Path(__file__).parents[3].parent / "shared" / "data" / "gsm8k"

FALSE_NEGATIVES: set[tuple[str, str]] = set()
"""Cases of the table that are the same and called different."""


def table() -> list[tuple[str, bool, str]]:
    """(reference, whether they are the same, answer)."""
    lines = [line for line in CASES.read_text().splitlines() if line.strip() and not line.startswith("#")]
    cases = [re.fullmatch(r"(.*?) (==|!=) (.*)", line) for line in lines]
    return [(case[1], case[2] == "==", case[3]) for case in cases if case]


def test_table_has_no_false_positive_and_little_unknown() -> None:
    cases = table()
    verdicts = {(left, right): compare(left, right) for left, _, right in cases}
    assert len(verdicts) == len(cases) >= 250
    assert {pair for pair in verdicts if verdicts[pair] is Verdict.same} <= {(a, b) for a, same, b in cases if same}
    assert {(a, b) for a, same, b in cases if same and verdicts[a, b] is Verdict.different} == FALSE_NEGATIVES
    assert Counter(verdicts.values())[Verdict.unknown] <= 0.1 * len(cases)


@pytest.mark.parametrize(("left", "same", "right"), table())
def test_verdicts_are_symmetric(left: str, same: bool, right: str) -> None:
    assert compare(left, right) is compare(right, left)
    assert compare(left, left) is Verdict.same


@pytest.mark.parametrize(
    ("left", "right", "options", "verdict"),
    [
        ("1/3", "0.333", {"decimals": "rounded"}, "same"),
        ("1/3", "0.334", {"decimals": "rounded"}, "different"),
        ("1/3", "0.33", {"decimals": "rounded"}, "different"),
        ("1/3", "0.33", {"decimals": "rounded", "rounded_digits": 2}, "same"),
        ("\\pi", "3.14", {"decimals": "rounded"}, "same"),
        ("3", "3.4", {"decimals": "rounded"}, "different"),
        ("100", "100.9", {"relative_tolerance": 0.01}, "same"),
        ("100", "102", {"relative_tolerance": 0.01}, "different"),
        ("10\\%", "10", {"percent_sign_optional": True}, "same"),
        ("10\\%", "0.1", {"percent_sign_optional": True}, "same"),
        ("5 cm", "5", {"units": "required"}, "different"),
        ("\\log 100", "2", {}, "unknown"),
        ("\\log 100", "2", {"log_base": "10"}, "same"),
        ("\\log 100", "2", {"log_base": "e"}, "different"),
    ],
)
def test_conventions(left: str, right: str, options: dict[str, object], verdict: str) -> None:
    conventions = Conventions(**options)  # type: ignore[arg-type]
    assert compare(left, right, conventions).value == verdict
    assert compare(right, left, conventions).value == verdict


# Random expressions as (text, rewritten text): the rewriting is by identities of arithmetic alone.


def _leaf(rng: random.Random) -> tuple[str, str]:
    number, factor = rng.randint(1, 40), rng.randint(2, 6)
    return rng.choice(
        [
            (f"{number}", f"\\frac{{{number * factor}}}{{{factor}}}"),
            (f"{number}.5", f"\\frac{{{2 * number + 1}}}{{2}}"),
            (f"\\sqrt{{{number}}}", f"\\frac{{\\sqrt{{{number * factor * factor}}}}}{{{factor}}}"),
            ("\\pi", f"\\frac{{{factor}\\pi}}{{{factor}}}"),
            ("x", "(x+1-1)"),
            ("y", f"\\frac{{{factor}y}}{{{factor}}}"),
            (f"{number}x^2", f"{number}x\\cdot x"),
        ]
    )


def _expression(rng: random.Random, depth: int) -> tuple[str, str]:
    if depth == 0:
        return _leaf(rng)
    (a, a2), (b, b2) = _expression(rng, depth - 1), _expression(rng, rng.randint(0, depth - 1))
    return rng.choice(
        [
            (f"({a}+{b})", f"({b2}+{a2})"),
            (f"({a}-({b}))", f"(-({b2})+{a2})"),
            (f"({a})({b})", f"({b2})({a2})"),
            (f"({a})({b}+3)", f"(({a2})({b2})+3({a2}))"),
            (f"({a}+{b})^2", f"(({a2})^2+2({a2})({b2})+({b2})^2)"),
            (f"(({a})^2-({b})^2)", f"({a2}+{b2})({a2}-({b2}))"),
            (f"\\sqrt{{({a})^2+3}}", f"\\sqrt{{3+({a2})({a2})}}"),
            (f"\\frac{{{a}}}{{7}}", f"\\frac{{2({a2})}}{{14}}"),
        ]
    )


@given(st.integers(0, 10**9), st.integers(1, 3))
def test_equal_by_construction_is_never_different(seed: int, depth: int) -> None:
    left, right = _expression(random.Random(seed), depth)
    assert compare(left, right) is Verdict.same


@given(st.integers(0, 10**9), st.integers(0, 3), st.integers(1, 60))
def test_perturbed_by_construction_is_never_the_same(seed: int, depth: int, digits: int) -> None:
    left, right = _expression(random.Random(seed), depth)
    assert compare(left, f"{right}+10^{{-{digits}}}") is Verdict.different


@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 30))
def test_nested_radicals_are_decided(a: int, b: int, digits: int) -> None:
    nested, sum_ = f"\\sqrt{{{a + b}+2\\sqrt{{{a * b}}}}}", f"\\sqrt{{{a}}}+\\sqrt{{{b}}}"
    assert compare(nested, sum_) is Verdict.same
    assert compare(nested, f"{sum_}-10^{{-{digits}}}") is Verdict.different


@given(st.text(max_size=40), st.text(alphabet="0123456789x+-*/^(){}[],.=<\\ !%$|", max_size=30))
def test_any_text_gets_a_symmetric_verdict(left: str, right: str) -> None:
    assert compare(left, right) is compare(right, left)
    assert compare(right, "5") is compare("5", right)


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}",
        "9^{9^9}",
        "99999999!",
        "(x+y+z)^{999}",
        "\\sqrt[63]{" * 30 + "2" + "}" * 30,
        "(" * 500 + "1" + ")" * 500,
        "1" * 1999,
        "+".join(f"\\sqrt{{{n}}}" for n in range(2, 300)),
        "(" + "+".join("abcdefgh") + ")^{40}",
        "\\frac{1}{" * 30 + "x+1" + "}" * 30,
        "2^{" * 30 + "x" + "}" * 30,
        "{1," * 300,
    ],
)
def test_hostile_answers_cost_bounded_work(text: str) -> None:
    assert compare(text, "5") in (Verdict.unknown, Verdict.different)
    assert compare(text, text) is Verdict.same


@pytest.mark.parametrize("file", ["train", "test"])
def test_gsm8k_references_agree_with_their_solutions_and_not_with_others(file: str) -> None:
    if not GSM8K.is_dir():
        pytest.skip("GSM8K is not beside the repository, in ../shared/data/gsm8k")
    rows = [json.loads(line) for line in (GSM8K / f"{file}.jsonl").read_text().splitlines()]
    references = [row["answer"].rpartition("####")[2].strip() for row in rows]
    verdicts = Counter(
        math_answer(completion=row["answer"], answer=reference).notes["verdict"]
        for row, reference in zip(rows, references, strict=True)
    )
    assert verdicts == {"same": len(rows)}
    values = {text: Fraction(text.replace(",", "")) for text in references}
    wrong = [
        (one, other)
        for one in values
        for other in random.Random(0).sample(sorted(values), 40)
        if compare(one, other) is not Verdict.of(values[one] == values[other])
    ]
    assert not wrong


def test_no_clock_is_in_a_verdict() -> None:
    """Limits count operations, so that a verdict is the same at every load."""
    folder = Path(inspect.getfile(compare)).parent
    imports = {
        name.split(".")[0]
        for file in folder.glob("*.py")
        for name in re.findall(r"^\s*(?:from|import) (\S+)", file.read_text(), re.MULTILINE)
    }
    assert {"math", "mpmath"} <= imports
    assert not imports & {"time", "datetime", "signal", "threading", "resource", "random", "os"}


def test_unknown_has_a_stated_value_and_a_verdict_is_a_note() -> None:
    score = math_answer(completion="\\boxed{\\log 100}", answer="2", unknown_value=0.25)
    assert (float(score), score.notes) == (0.25, {"verdict": "unknown", "extracted": "\\log 100"})
    assert math_answer(completion="no idea", answer="2").notes == {"verdict": "missing"}


def test_references_that_cannot_be_used() -> None:
    assert reference_fault("\\frac{1}{2}", {}) is None
    assert reference_fault("9^{9^9}", {}) is None
    assert "cannot be read" in str(reference_fault("\\frac{1}{", {}))
    assert "cannot be read" in str(reference_fault("\\frac{1}{0}", {}))
    assert "no reference" in str(reference_fault(None, {}))
    assert "decimals: given 'near'" in str(reference_fault("2", {"decimals": "near"}))
