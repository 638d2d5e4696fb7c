"""References that cannot be read are named by file and line, before a run starts."""

import pytest

from megatron_rl.config.schema import RewardFunctionConfig, RewardsConfig
from megatron_rl.data.files import DataError
from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.rewards.references import check_references
from megatron_rl.rewards.scoring import BoundReward, resolve_rewards, score


def prompts(*answers: str | None) -> list[Prompt]:
    return [Prompt(i, (1,), "p", answer, f"data.jsonl:{i + 1}") for i, answer in enumerate(answers)]


def rewards(name: str, **args: object) -> list[BoundReward]:
    return resolve_rewards(RewardsConfig([RewardFunctionConfig(name, 1.0, dict(args))]))


def test_the_first_unreadable_reference_is_named() -> None:
    faulty = prompts("1", "\\frac{1}{2", None, "2")
    with pytest.raises(DataError, match=r"^data.jsonl:2: reward 'math_answer': .*2 of 4 rows"):
        check_references(faulty, rewards("math_answer"), tolerated=0.25)
    check_references(faulty, rewards("math_answer"), tolerated=0.5)
    check_references(prompts("1", "x^2", "\\text{no}"), rewards("math_answer"), tolerated=0.0)


def test_numeric_answer_needs_numbers_whatever_is_tolerated() -> None:
    with pytest.raises(DataError, match=r"^data.jsonl:1: reward 'numeric_answer': .*math_answer reads others"):
        check_references(prompts("\\pi"), rewards("numeric_answer"), tolerated=1.0)


def test_an_option_that_does_not_exist_is_told_at_the_start() -> None:
    with pytest.raises(DataError, match="units: given 'none', allowed: 'optional', 'required'"):
        check_references(prompts("1"), rewards("math_answer", units="none"), tolerated=0.0)


def test_a_tolerated_reference_is_unknown_and_stops_nothing() -> None:
    completions = [Completion((1,), (0.0,), "\\boxed{3}", "stop", 0)] * 2
    samples = score(prompts(None, "\\frac{1}{2"), completions, rewards("math_answer", unknown_value=0.5))
    assert [sample.reward for sample in samples] == [0.5, 0.5]
    assert samples[1].notes == {"math_answer": {"verdict": "unknown", "extracted": "3"}}
