"""`megatron-rl rewards`: what a run's rewards say of a file of completions."""

import json
from pathlib import Path

import pytest

from megatron_rl.cli.main import main

CONFIG = """
name: run
recipe: rl
model: {hf_path: none}
data: {train: none.jsonl}
rewards:
  functions:
    - {name: math_answer}
    - {name: tests.unit.rewards.verifiers:obedient, weight: 0.1}
"""


def files(tmp_path: Path, *rows: dict[str, str]) -> list[str]:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["rewards", str(tmp_path / "run.yaml"), "--on", str(tmp_path / "rows.jsonl")]


def test_every_reward_of_every_row_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"completion": "\\boxed{0.5}", "answer": "\\frac12"}, {"completion": "raise it", "answer": "2"}]
    assert main(files(tmp_path, *rows)) == 1
    told = capsys.readouterr().out
    assert "rows.jsonl:1  reference '\\\\frac12'\n  math_answer: 1, verdict same, extracted '0.5' (" in told
    assert "  tests.unit.rewards.verifiers:obedient: failed: " in told
    assert "math_answer: 2 scored, mean 0.5, missing 50.0%, same 50.0%; " in told
    assert "obedient: 1 scored, mean 11, 1 failed; " in told


def test_mistakes_are_told_with_their_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(files(tmp_path, {"answer": "2"})) == 2
    assert "rows.jsonl:1: no key 'completion'" in capsys.readouterr().err
    assert main(files(tmp_path, {"completion": "2", "answer": "\\frac{1"})) == 2
    assert "rows.jsonl:1: reward 'math_answer': '\\\\frac{1' cannot be read" in capsys.readouterr().err
