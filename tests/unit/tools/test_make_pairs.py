"""What is written of some scored answers: pairs, single answers and steps."""

import json
from pathlib import Path
from typing import Any

from megatron_rl.data.samples import Completion, Prompt, Sample
from tools.make_pairs import write


def answers(prompt: str, *scored: tuple[str, float]) -> list[Sample]:
    asked = Prompt(0, (1,), prompt, None, "f:1", row={"prompt": prompt})
    return [Sample(asked, Completion((5, 1), (-1.0, -1.0), text, "stop", 0), reward, {}) for text, reward in scored]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_best_answer_against_each_worse_one_and_its_steps(tmp_path: Path) -> None:
    groups = [
        answers("8+4=", ("12", 1.0), ("13", 0.0), ("1", 0.0), ("13", 0.0), ("12", 1.0)),
        answers("1+1=", ("2", 1.0), ("2", 1.0)),  # all alike: nothing to learn
    ]
    assert write(tmp_path, "heldout_", groups, "prompt", "<eos>") == 2
    both = {"prompt": "8+4=", "chosen": "12"}
    assert rows(tmp_path / "heldout_pairs.jsonl") == [both | {"rejected": "13"}, both | {"rejected": "1"}]
    judged = rows(tmp_path / "heldout_judged.jsonl")
    assert [(row["response"], row["label"]) for row in judged] == [("12", True), ("13", False)]
    # "1" begins as the right answer does, and ends too early.
    steps = [(row["response"], row["label"]) for row in rows(tmp_path / "heldout_steps.jsonl")]
    assert steps == [
        (["1", "2", "<eos>"], [True, True, True]),
        (["1", "3", "<eos>"], [True, False, False]),
        (["1", "<eos>"], [True, False]),
    ]
