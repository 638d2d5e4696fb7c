"""Scores are weighted sums of terms, and a reward that fails names the sample."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.config.schema import RewardFunctionConfig, RewardsConfig
from megatron_rl.data.files import DataError
from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.rewards.references import check_references
from megatron_rl.rewards.scoring import BoundReward, RewardError, resolve_rewards, score

PROMPT = Prompt(4, (1, 2), "2+2=", "4", "train.jsonl:5", {"level": 3})


def completion(text: str) -> Completion:
    return Completion((7,), (-1.0,), text, "length", 0)


def returning(value: Any, name: str = "r", weight: float = 1.0) -> BoundReward:
    return BoundReward(name, weight, lambda **_: value)


def test_a_reward_is_the_weighted_sum_and_terms_are_unweighted() -> None:
    rewards = [
        BoundReward("right", 2.0, lambda *, completion, answer, **_: float(completion == answer)),
        BoundReward("length", -0.5, lambda *, completion, **_: len(completion)),
    ]
    first, second = score([PROMPT, PROMPT], [completion("4"), completion("five")], rewards)
    assert (first.reward, first.reward_terms) == (2.0 - 0.5, {"right": 1.0, "length": 1.0})
    assert (second.reward, second.reward_terms) == (-2.0, {"right": 0.0, "length": 4.0})
    assert (first.prompt, second.completion.text) == (PROMPT, "five")


def test_a_reward_sees_text_answer_row_and_finish_reason() -> None:
    seen: list[dict[str, Any]] = []
    score([PROMPT], [completion("4")], [BoundReward("r", 1.0, lambda **given: seen.append(given) or 0.0)])
    assert seen == [
        {"prompt": "2+2=", "completion": "4", "answer": "4", "row": {"level": 3}, "finish_reason": "length"}
    ]


def test_no_rewards_is_zero() -> None:
    (sample,) = score([PROMPT], [completion("4")], [])
    assert (sample.reward, sample.reward_terms) == (0.0, {})


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.float64(1), np.int64(1)])
def test_any_real_number_is_a_term(value: Any) -> None:
    (sample,) = score([PROMPT], [completion("4")], [returning(value)])
    assert sample.reward_terms == {"r": 1.0}
    assert type(sample.reward_terms["r"]) is float


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None (NoneType)"),
        (float("nan"), "nan (float)"),
        (float("-inf"), "-inf (float)"),
        ("1.0", "'1.0' (str)"),
        (1j, "1j (complex)"),
        (10**400, "1000"),
    ],
)
def test_what_is_no_finite_number_is_an_error(value: Any, shown: str) -> None:
    with pytest.raises(RewardError, match="not a finite number") as error:
        score([PROMPT], [completion("4")], [returning(value)])
    assert f"reward 'r' returned {shown}" in str(error.value)
    assert len(str(error.value)) < 300


def test_a_reward_that_raises_names_itself_the_row_the_completion_and_the_line() -> None:
    def fails(**_: Any) -> float:
        raise KeyError("level")

    with pytest.raises(RewardError) as error:
        score([PROMPT], [completion("so\n" + "x" * 200)], [BoundReward("mine", 1.0, fails)])
    line = fails.__code__.co_firstlineno + 1
    shown = "so\\n" + "x" * 77  # 80 characters, the line break among them
    assert str(error.value) == (
        f"reward 'mine' raised KeyError: 'level' (test_scoring.py:{line}); "
        f"sample train.jsonl:5, completion '{shown}' ..."
    )
    assert isinstance(error.value.__cause__, KeyError)


def test_prompts_and_completions_must_pair_up() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score([PROMPT, PROMPT], [completion("4")], [])


@pytest.mark.parametrize(
    "value", [np.True_, np.isclose(1.0, 1.0), np.array(1.0), np.float32(1), torch.tensor(1.0), torch.tensor(True)]
)
def test_a_scalar_of_numpy_or_torch_is_a_term(value: Any) -> None:
    assert score([PROMPT], [completion("x")], [returning(value)])[0].reward == 1.0


def test_a_reference_that_cannot_be_graded_against_is_named_by_its_row() -> None:
    rewards = resolve_rewards(RewardsConfig(functions=[RewardFunctionConfig(name="numeric_answer")]))
    good = replace(PROMPT, answer="3")
    check_references([good], rewards, tolerated=0.0)
    for answer in ("3, 4", None, "nan", r"\sqrt{2}"):
        with pytest.raises(DataError, match=f"{PROMPT.source}: reward 'numeric_answer': "):
            check_references([good, replace(PROMPT, answer=answer)], rewards, tolerated=0.0)
