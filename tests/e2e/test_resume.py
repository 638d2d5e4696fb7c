"""A run that is killed and started again ends as if nothing had happened: bit for bit, wherever it was killed.

Each kill is SIGKILL to the launcher, the ranks and all that they started, while rank 0 is stopped inside the phase.
What is compared are all metrics but times, all logged rollouts, and the bytes of the exported weights.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.checkpoint.folders import delete_old, iteration_folder
from megatron_rl.config.errors import EXIT_RESUME
from megatron_rl.runs.logs import rollout_steps
from tests.e2e.runs import NUM_STEPS, Run, continue_until_it_ends, kill, reference, repeatable

PARTIAL = ".iter_000000{}.partial"

KILLS = [
    pytest.param("trainer/rl.py:generate", 3, id="generate"),
    pytest.param("core/dist_checkpointing/serialization.py:save", 5, id="save"),
    # Before the first checkpoint: the run starts anew.
    pytest.param("trainer/evaluation.py:evaluate", 0, id="first_evaluation", marks=pytest.mark.slow),
    pytest.param("core/dist_checkpointing/serialization.py:save", 3, id="first_save", marks=pytest.mark.slow),
    pytest.param("trainer/rl.py:log_probs", 3, id="log_probs", marks=pytest.mark.slow),
    pytest.param("engine/step.py:forward_backward", 3, id="train", marks=pytest.mark.slow),
    pytest.param("rollout/engine.py:load_shards", 4, id="sync_weights", marks=pytest.mark.slow),
    pytest.param("trainer/evaluation.py:evaluate", 4, id="last_evaluation", marks=pytest.mark.slow),
    pytest.param("checkpoint/hf_export.py:_write_shards", 5, id="export", marks=pytest.mark.slow),
]
"""Where, and after how many rows of metrics; row 0 is the evaluation before training."""


def assert_equals_the_undisturbed(run: Run) -> None:
    expected = reference()
    assert repeatable(run.rows) == repeatable(expected.rows)
    assert rollout_steps(run.directory) == rollout_steps(expected.directory)
    for step in rollout_steps(expected.directory):
        file = expected.directory.rollout_file(step).name
        assert (run.directory.rollouts_dir / file).read_bytes() == (expected.directory.rollouts_dir / file).read_bytes()
    assert run.exported_bytes == expected.exported_bytes


@pytest.mark.parametrize(("place", "after_rows"), KILLS)
def test_a_killed_run_ends_as_an_undisturbed_one(place: str, after_rows: int, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.kill_inside(place, after_rows=after_rows)
    assert not run.directory.hf_dir.exists()
    if place.endswith("serialization.py:save"):
        # Killed while it was written, the checkpoint is not among those that count.
        assert (run.directory.checkpoints_dir / PARTIAL.format(after_rows - 1)).is_dir()
        assert not (run.directory.checkpoints_dir / f"iter_000000{after_rows - 1}").exists()
    run.succeed()
    assert_equals_the_undisturbed(run)
    assert sorted(path.name for path in run.directory.checkpoints_dir.glob("*iter_*")) == [
        "iter_0000002",
        "iter_0000004",
    ]


@pytest.mark.parametrize(
    ("keep_last", "left"), [(None, [2, 4, 6, 8, 10]), (1, [6, 8, 10]), (2, [4, 6, 8, 10]), (9, [2, 4, 6, 8, 10])]
)
def test_a_run_that_was_set_back_keeps_what_it_writes(keep_last: int | None, left: list[int], tmp_path: Path) -> None:
    """It had reached step 10, was set back to 4, and has just saved step 6 anew."""
    for step in (2, 4, 6, 8, 10):
        iteration_folder(tmp_path, step).mkdir()
    delete_old(tmp_path, 6, keep_last)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"iter_{step:07d}" for step in left]


def copy_of_the_reference(folder: Path) -> Run:
    shutil.copytree(reference().folder, folder, dirs_exist_ok=True)
    return Run(folder)


def test_a_finished_run_started_again_stays_as_it_is(tmp_path: Path) -> None:
    run = copy_of_the_reference(tmp_path).succeed()
    assert run.directory.metrics_file.read_bytes() == reference().directory.metrics_file.read_bytes()
    assert_equals_the_undisturbed(run)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param("__0_0.distcp", flip),
        pytest.param("__1_1.distcp", truncate, marks=pytest.mark.slow),
        pytest.param(".metadata", truncate, marks=pytest.mark.slow),
        pytest.param("metadata.json", truncate, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    run = copy_of_the_reference(tmp_path)
    shutil.rmtree(run.directory.hf_dir)
    file = run.directory.checkpoints_dir / f"iter_000000{NUM_STEPS}" / name
    file.write_bytes(damage(file.read_bytes()))
    ended = run.finish()
    assert ended.code == 0, ended.stderr[-4000:]
    (said,) = [line for line in ended.stderr.splitlines() if "going back to an earlier checkpoint" in line]
    assert said.startswith("megatron-rl: ")
    assert f"runs/run/checkpoints/{file.parent.name}/{name}" in said
    assert_equals_the_undisturbed(run)


def test_without_a_whole_checkpoint_nothing_is_touched(tmp_path: Path) -> None:
    run = copy_of_the_reference(tmp_path)
    for file in run.directory.checkpoints_dir.glob("iter_*/__0_0.distcp"):
        file.write_bytes(truncate(file.read_bytes()))
    ended = run.finish()
    assert ended.code == 2, ended.stderr[-4000:]
    assert ended.last_line.startswith("megatron-rl: error: ")
    assert "no whole checkpoint is left" in ended.last_line
    assert ended.stderr.count("no whole checkpoint is left") == 1
    assert run.directory.metrics_file.read_bytes() == reference().directory.metrics_file.read_bytes()


def test_told_to_stop_a_run_saves_and_goes_on_later(tmp_path: Path) -> None:
    """And while it runs, its folder is its own."""
    run = Run(tmp_path)
    process = run.start_and_stop_inside("trainer/rl.py:generate", after_rows=2)
    try:
        second = run.finish()
        assert second.code == 2, second.stderr[-4000:]
        assert re.search(r"error: runs/run: in use by process \d+ on \S+, since", second.last_line)
        assert second.stderr.count("in use by") == 1
        process.send_signal(signal.SIGTERM)
        continue_until_it_ends(process)
        assert process.returncode == EXIT_RESUME
    finally:
        kill(process)
    # Row 0 is the evaluation before training. The step in which the signal came is made and saved, and no other.
    assert [row["step"] for row in run.rows] == [0, 1, 2]
    assert sorted(path.name for path in run.directory.checkpoints_dir.glob("iter_*")) == ["iter_0000002"]
    run.succeed()
    assert_equals_the_undisturbed(run)


def test_told_to_stop_before_the_first_step_a_rank_asks_for_another_start(tmp_path: Path) -> None:
    """It waits for a rank that never comes; the job script finds the code where it looks for it."""
    run = Run(tmp_path)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29"}
    command = [sys.executable, "-m", "megatron_rl", "train", "run.yaml"]
    environment = os.environ | place | {"MEGATRON_RL_ATTEMPT_LOGS": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=run.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs/run: rl on 2 ranks = tensor 2 x pipeline 1 x data 1\n"
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_RESUME
    assert errors.rpartition("megatron-rl: ")[2] == (
        "SIGUSR1 before the first step: nothing is lost; the same command starts again\n"
    )
    assert (tmp_path / "exit_code").read_text() == f"{EXIT_RESUME}\n"
