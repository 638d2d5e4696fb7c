"""A run leaves its job before the job ends, with a clock of the test's own; squeue's and Slurm's answers are read."""

import os
import random
import stat
import time
from datetime import datetime
from pathlib import Path

import pytest

from megatron_rl.runs.interruption import JobClock, job_end, tell_saved


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def steps_of_job(length: float, durations: list[float], save_seconds: float) -> tuple[int, float]:
    """How many steps a job of this length makes before it stops itself, and the seconds that are left then."""
    clock = Clock()
    end = clock.now + length
    job = JobClock(lambda: end, save_minutes=None, clock=clock)
    for count, duration in enumerate(durations, 1):
        job.start_step()
        clock.now += duration
        job.end_step()
        if job.out_of_time(save_seconds) is not None:
            clock.now += save_seconds
            return count, end - clock.now
    raise AssertionError("the job has not ended")


@pytest.mark.parametrize("seed", range(50))
def test_a_job_stops_itself_while_steps_take_up_to_a_third_of_its_limit(seed: int) -> None:
    draw = random.Random(seed)
    length = draw.uniform(600, 86400)
    longest = draw.uniform(0.001, 1 / 3) * length
    durations = [draw.uniform(longest / 1.5, longest) for _ in range(10000)]
    count, left = steps_of_job(length, durations, save_seconds=0.02 * length)
    assert left >= 0
    assert count >= 1


def test_the_last_step_that_fits_is_made() -> None:
    # 1.5 x 10 s + 5 s + 10 s to leave: with 30 s left another step is begun, with less none.
    assert steps_of_job(130.0, [10.0] * 100, save_seconds=5.0) == (11, 15.0)
    assert steps_of_job(129.0, [10.0] * 100, save_seconds=5.0) == (10, 24.0)


def test_a_limit_that_was_raised_is_asked_for_again() -> None:
    clock, ends = Clock(), [1100.0, 2000.0]
    job = JobClock(lambda: ends.pop(0), save_minutes=None, clock=clock)
    job.start_step()
    clock.now = 1095.0
    job.end_step()
    assert job.out_of_time(0.0) is None
    assert ends == []


def test_without_an_end_a_run_is_never_out_of_time() -> None:
    clock = Clock()
    job = JobClock(lambda: None, save_minutes=None, clock=clock)
    job.start_step()
    clock.now += 1e9
    job.end_step()
    assert job.out_of_time(1e9) is None


def test_the_reason_says_what_is_left_and_what_is_needed() -> None:
    clock = Clock()
    job = JobClock(lambda: 1100.0, save_minutes=None, clock=clock)
    job.start_step()
    clock.now += 60
    job.end_step()
    assert job.out_of_time(1.0) == "the job ends in 40 s, and a step has taken up to 60 s"


def test_a_checkpoint_is_due_by_the_clock() -> None:
    clock = Clock()
    job = JobClock(lambda: None, save_minutes=2.0, clock=clock)
    clock.now += 119.0
    assert not job.save_is_due
    clock.now += 1.0
    assert job.save_is_due
    job.start_save()
    assert not job.save_is_due


def squeue(folder: Path, says: str) -> None:
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_squeue_knows_when_the_job_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    end = int(time.time()) + 3600
    squeue(tmp_path, f"echo {datetime.fromtimestamp(end).isoformat()}")
    told = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1"}
    assert job_end(told) == end
    squeue(tmp_path, "echo NONE")
    assert job_end({"SLURM_JOB_ID": "7"}) is None
    squeue(tmp_path, "echo slurm_load_jobs error: busy >&2; exit 1")
    assert job_end(told) == 1.0
    assert job_end({}) is None


def test_without_squeue_the_environment_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1800000000"}) == 1800000000.0
    assert job_end({"SLURM_JOB_ID": "7"}) is None


def test_a_checkpoint_is_told_to_the_job_script(tmp_path: Path) -> None:
    tell_saved(12, {"MEGATRON_RL_ATTEMPT_LOGS": str(tmp_path)})
    tell_saved(13, {"MEGATRON_RL_ATTEMPT_LOGS": str(tmp_path / "gone")})
    tell_saved(14, {})
    assert (tmp_path / "saved").read_text() == "12\n"
