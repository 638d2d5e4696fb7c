"""What the doctor says of a run's folder, for each of the ways in which a run can stand or lie."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.runs.diagnosis import RankState, diagnosis, write_state
from megatron_rl.runs.directory import RunDirectory
from tests.unit.runs.test_hang_report import NOW, WAIT, state

ALIVE = dict(pid=os.getpid(), host=socket.gethostname())
DEAD = dict(pid=2**22 + 1, host=socket.gethostname())  # beyond the largest process id that Linux gives


def examine(folder: Path, states: list[RankState]) -> list[str]:
    run = RunDirectory(folder / "run")
    run.create()
    for one in states:
        write_state(run.ranks_dir, one)
    return diagnosis(run, now=NOW)


@pytest.mark.parametrize(
    ("changes", "condition"),
    [
        ([], "has not started, or its logs are gone"),
        ([ALIVE, ALIVE], "running: all ranks wait in "),
        ([ALIVE, ALIVE | {"time": NOW - 20}], "hanging: rank 1 is silent for 20 s (process "),
        ([DEAD, DEAD | {"time": NOW - 5}], "dead: no rank has said anything for 0 s, and none said why; the same"),
        (
            [ALIVE | {"host": "gone", "time": NOW - 7200}],
            "dead: no rank has said anything for 2.0 h, and none said why",
        ),
        (
            [{"ended": "RuntimeError: gloo", "time": NOW - 1}, {"ended": "RewardError: no verdict", "time": NOW - 3}],
            "failed: rank 1 first, with RewardError: no verdict; the same command goes on",
        ),
        (
            [{"ended": "Interrupted: SIGUSR1: the state after step 7 is saved"}],
            "told to stop, and saved (Interrupted: SIGUSR1: the state after step 7 is saved); the same command goes on",
        ),
        ([{"ended": "done"}, {"ended": "done"}], "ended"),
    ],
)
def test_the_condition(changes: list[dict[str, Any]], condition: str, tmp_path: Path) -> None:
    lines = examine(tmp_path, [state(rank, **change) for rank, change in enumerate(changes)])
    (said,) = [line for line in lines if line.startswith("condition")]
    assert said.removeprefix("condition   ").startswith(condition)


def test_checkpoints_and_last_words(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    for name in ("iter_0000002", "iter_0000004", ".iter_0000006.partial"):
        (run.checkpoints_dir / name).mkdir()
    (run.checkpoints_dir / "latest_checkpointed_iteration.txt").write_text("4\n")
    logs = run.logs_dir / "job_7" / "attempt_0.0"
    logs.mkdir(parents=True)
    (logs / "rank_1.log").write_text("step 5\nRuntimeError: connection closed by peer\n")
    (logs / "rank_0.log").write_text("step 5\n")
    lines = examine(tmp_path, [state(0, **ALIVE), state(1, **DEAD)])
    assert lines[2] == (
        "checkpoint  step 4, of 2 on disk; .iter_0000006.partial was cut short, and is cleared away by the next save"
    )
    assert any(line.startswith("rank 0 ") and line.endswith(f"{WAIT.partition(': ')[2]}, 0 s ago") for line in lines)
    assert lines[-1] == f"log         {logs / 'rank_1.log'}: RuntimeError: connection closed by peer"
