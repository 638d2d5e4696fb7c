import json
import math

import pytest

from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.logs import read_rollouts, rollout_steps, truncate_rollouts_to_step, write_rollouts


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_records_come_back_with_all_their_text(run):
    # U+2028 ends a line for str.splitlines, and a lone surrogate is no UTF-8.
    records = [{"completion": "a\nb \u2028 \x85 ü 数\t<script>", "reward": 0.1}, {"completion": "", "reward": 1.0}]
    file = write_rollouts(run, 10, records)
    assert file == run.path / "rollouts" / "step_0000010.jsonl"
    assert read_rollouts(run, 10) == records
    write_rollouts(run, 11, [{"completion": "x\ud800y"}])
    assert read_rollouts(run, 11) == [{"completion": "x?y"}]


def test_numbers_that_are_not_finite_become_null_at_any_depth(run):
    file = write_rollouts(
        run, 1, [{"advantage": math.nan, "reward_terms": {"math": math.inf, "list": [1.0, math.nan]}}]
    )
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "advantage": None,
        "reward_terms": {"math": None, "list": [1.0, None]},
    }


def test_writing_again_replaces_and_leaves_no_partial_file(run):
    write_rollouts(run, 1, [{"reward": 1.0}, {"reward": 2.0}])
    write_rollouts(run, 1, [{"reward": 3.0}])
    assert read_rollouts(run, 1) == [{"reward": 3.0}]
    assert [file.name for file in run.rollouts_dir.iterdir()] == ["step_0000001.jsonl"]


def test_truncation_keeps_the_steps_up_to_the_checkpoint(run):
    # Step 10,000,000 has eight digits and sorts before 9 by name.
    for step in (9, 10, 10_000_000):
        write_rollouts(run, step, [{"step": step}])
    (run.rollouts_dir / "step_notes.jsonl").write_text("mine\n")
    assert rollout_steps(run) == [9, 10, 10_000_000]
    truncate_rollouts_to_step(run, 9)
    assert rollout_steps(run) == [9]
    assert (run.rollouts_dir / "step_notes.jsonl").exists()


def test_a_run_without_rollouts_has_none(run):
    assert rollout_steps(run) == []
    truncate_rollouts_to_step(run, 0)
