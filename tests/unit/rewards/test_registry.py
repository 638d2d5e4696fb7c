"""Resolving rewards: what a function receives, and every mistake told before the first completion."""

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.schema import RewardFunctionConfig, RewardsConfig
from megatron_rl.rewards.scoring import BUILT_INS, BoundReward, RewardError, resolve_rewards

SAMPLE = {"prompt": "p", "completion": "1 and 72", "answer": "72", "row": {"k": 1}, "finish_reason": "stop"}

MODULE = """
def named(*, completion, row, factor=2.0):
    return factor * len(completion) * row["k"]

def everything(**keywords):
    return keywords

def needs(completion, threshold):
    return threshold

def by_position(completion, /):
    return 0.0

number = 3

class Judge:
    def __call__(self, answer):
        return answer

judge = Judge()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the module `custom_rewards` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("custom_rewards", "broken_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "custom_rewards.py").write_text(MODULE)
    return tmp_path


def resolve(name: str, weight: float = 1.0, **args: Any) -> BoundReward:
    (bound,) = resolve_rewards(RewardsConfig([RewardFunctionConfig(name, weight, args)]))
    return bound


def test_built_ins_are_bound_with_name_weight_and_args() -> None:
    bound = resolve("numeric_answer", 0.5, extract="hash")
    assert (bound.name, bound.weight) == ("numeric_answer", 0.5)
    assert bound.call(**SAMPLE) == 0.0
    assert resolve("numeric_answer").call(**SAMPLE) == 1.0


@pytest.mark.parametrize("name", sorted(BUILT_INS))
def test_every_built_in_takes_the_keywords_of_a_sample(name: str) -> None:
    row = {"schema": {"type": "number"}, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert resolve(name).call(**{**SAMPLE, "row": row}) in (0.0, 1.0)


def test_a_function_gets_what_it_names_and_one_with_kwargs_gets_all(folder: Path) -> None:
    assert resolve("custom_rewards:named").call(**SAMPLE) == 2.0 * len("1 and 72")
    assert resolve("custom_rewards:named", factor=3.0).call(**SAMPLE) == 3.0 * len("1 and 72")
    assert resolve("custom_rewards:everything", extra=1).call(**SAMPLE) == {**SAMPLE, "extra": 1}
    assert resolve("custom_rewards:judge").call(**SAMPLE) == "72"


def test_the_current_folder_comes_last(folder: Path) -> None:
    (folder / "json.py").write_text("def dumps(completion): return 0.0")
    resolve("custom_rewards:named")
    assert sys.path[-1] == str(folder)


def test_order_is_that_of_the_settings_and_a_name_stands_once() -> None:
    settings = [RewardFunctionConfig("think_format"), RewardFunctionConfig("exact_match")]
    assert [bound.name for bound in resolve_rewards(RewardsConfig(settings))] == ["think_format", "exact_match"]
    with pytest.raises(RewardError, match=r"rewards\.functions\[2\]\.name: 'think_format' is given twice"):
        resolve_rewards(RewardsConfig([*settings, RewardFunctionConfig("think_format")]))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("numeric_anwser", {}, "name: no built-in reward 'numeric_anwser'; did you mean 'numeric_answer'? valid are "),
        ("zzz", {}, "valid are numeric_answer, math_answer, "),
        ("custom_rewards.named", {}, "or a path 'package.module:function'"),
        ("no_such_module:f", {}, "cannot import 'no_such_module' of 'no_such_module:f': ModuleNotFoundError"),
        ("broken_rewards:f", {}, "cannot import 'broken_rewards' of 'broken_rewards:f': ZeroDivisionError: "),
        ("custom_rewards:nmed", {}, "module 'custom_rewards' has no 'nmed'; did you mean 'named'?"),
        ("custom_rewards:number", {}, "'custom_rewards:number' is not a function but of type int"),
        (
            "custom_rewards:named",
            {"facto": 1},
            "args: 'custom_rewards:named' takes no argument 'facto'; did you mean 'f",
        ),
        ("exact_match", {"x": 1}, "args: 'exact_match' takes no argument 'x'; valid are none"),
        ("exact_match", {"answer": "1"}, "args: 'answer' comes from the sample and cannot be set"),
        ("custom_rewards:needs", {}, "args: 'custom_rewards:needs' needs 'threshold', which is neither in args"),
        ("custom_rewards:by_position", {}, "takes 'completion' by position only"),
    ],
)
def test_mistakes(folder: Path, name: str, args: dict[str, Any], message: str) -> None:
    (folder / "broken_rewards.py").write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(RewardError) as error:
        resolve(name, **args)
    assert str(error.value).startswith("rewards.functions[0].")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_that_fails_to_import_is_told_with_its_line(folder: Path) -> None:
    (folder / "broken_rewards.py").write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(RewardError, match=r"\(broken_rewards\.py:2\)") as error:
        resolve("broken_rewards:f")
    assert isinstance(error.value.__cause__, ZeroDivisionError)
