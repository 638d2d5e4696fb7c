"""`math_answer`: the reward for a right answer in mathematics."""

from collections.abc import Mapping

from megatron_rl.rewards.extraction import RULES, extract
from megatron_rl.rewards.mathematics.comparison import compare
from megatron_rl.rewards.mathematics.conventions import Conventions
from megatron_rl.rewards.mathematics.expression import Unreadable, Value
from megatron_rl.rewards.mathematics.normal_form import TooLarge
from megatron_rl.rewards.mathematics.reading import read
from megatron_rl.rewards.mathematics.reduction import Reduction
from megatron_rl.rewards.mathematics.verdict import Verdict
from megatron_rl.rewards.score import Score

NO_ANSWER = "missing"
"""The verdict on a completion in which no answer is found."""


def math_answer(
    *,
    completion: str,
    answer: str | None,
    extraction: str = "auto",
    unknown_value: float = 0.0,
    different_value: float = 0.0,
    decimals: str = "exact",
    rounded_digits: int = 3,
    relative_tolerance: float = 0.0,
    percent_sign_optional: bool = False,
    units: str = "optional",
    log_base: str | None = None,
) -> Score:
    """1 for an answer that is the same as the reference.

    Args:
        completion: text of the model.
        answer: reference; where it is missing or unreadable, which `references` finds at the start, all is unknown.
        extraction: a rule of `rewards.extraction`.
        unknown_value: where neither same nor different is proven; the share of these is a metric.
        different_value: of another answer, or none; -1 as in DAPO.
        decimals, rounded_digits, relative_tolerance, percent_sign_optional, units, log_base: see `Conventions`.

    Raises:
        ValueError: an option has no such value.
    """
    if extraction not in RULES:
        raise ValueError(f"extraction: given {extraction!r}, allowed: {', '.join(RULES)}")
    conventions = Conventions(decimals, rounded_digits, relative_tolerance, percent_sign_optional, units, log_base)
    extracted = extract(completion, extraction)
    if extracted is None:
        return Score(different_value, {"verdict": NO_ANSWER})
    verdict = Verdict.unknown if answer is None else compare(extracted, answer, conventions)
    value = {Verdict.same: 1.0, Verdict.different: different_value, Verdict.unknown: unknown_value}[verdict]
    return Score(value, {"verdict": verdict.value, "extracted": extracted})


def reference_fault(answer: str | None, arguments: Mapping[str, object]) -> str | None:
    """Why `math_answer` with these arguments cannot use a reference; None: it can."""
    if answer is None:
        return "the row has no reference answer (data.answer_key)"
    try:
        math_answer(completion="", answer=answer, **arguments)  # type: ignore[arg-type]
        read_answer = read(answer)
        if isinstance(read_answer, Value):
            Reduction().quotient(read_answer.expression)
    except TooLarge:
        return None  # 9^(9^9) can still be answered as it stands
    except Unreadable as error:
        return None if "infinity" in str(error) else f"{answer!r} cannot be read: {error}"
    except ValueError as error:
        return str(error)
    return None
