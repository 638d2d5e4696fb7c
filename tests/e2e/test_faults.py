"""Faults at random points, by real signals: nothing is lost but the steps since the last checkpoint, nothing done
twice.

What is compared at the end is what an undisturbed run leaves: all metrics but times, and the bytes of the weights. A
row that is missing, doubled or from another past would show in the first, a step made twice in both.
"""

import json
import random
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.errors import EXIT_HANG
from tests.e2e.forked_ranks import ForkedRanks
from tests.e2e.runs import Run, kill, reference, repeatable

NUM_KILLS = 50
NUM_STEPS = 60

SUPERVISED: dict[str, dict[str, Any]] = {
    "data": {"train": "sft.jsonl", "eval": None, "max_prompt_tokens": 16},
    "evaluation": {"interval": 0},
    "algorithm": {"kl": {"coefficient": 0.0}, "entropy_coefficient": 0.0},
    "train": {"num_steps": NUM_STEPS, "global_batch_size": 8, "micro_batch_tokens": 64},
    "parallel": {"tensor_model_parallel_size": 1, "data_parallel_size": 2},
    "checkpoint": {"save_interval": 2, "keep_last": 2},
}


def supervised_run(folder: Path) -> Run:
    """Fine-tuning on two data-parallel ranks: it starts in seconds, so it can be killed often."""
    run = Run(folder, **SUPERVISED)
    config = json.loads((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(json.dumps(config | {"recipe": "sft"}))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    with (folder / "sft.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": row["prompt"], "response": row["answer"]}) + "\n" for row in rows)
    return run


def num_rows(run: Run) -> int:
    return len(run.rows) if run.directory.metrics_file.exists() else 0


def disturb(run: Run, ranks: ForkedRanks, rng: random.Random) -> str:
    """Start the run and kill one rank or all a random while after that, or after its first step; what was killed."""
    before, deadline = num_rows(run), time.monotonic() + 120.0
    ranks.start(run.folder)
    if rng.random() < 0.8:
        while ranks.running() and num_rows(run) in (before, 0):
            assert time.monotonic() < deadline, "it makes no step"
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.5))
    else:
        time.sleep(rng.uniform(0.0, 2.0))
    target = rng.choice(["rank 0", "rank 1", "all"])
    if not ranks.running():
        target = "nothing"
    ranks.kill(*{"rank 0": [0], "rank 1": [1], "all": [0, 1], "nothing": []}[target])
    if target.startswith("rank"):
        time.sleep(rng.uniform(0.0, 0.1))  # until a launcher ends the others, they go on as far as they come
        ranks.kill(0, 1)
    codes = ranks.wait()
    assert target != "nothing" or codes == [0, 0], (run.folder / "rank_0.log").read_text()[-4000:]
    return target


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """By the command line, with its launcher."""
    return supervised_run(tmp_path_factory.mktemp("undisturbed")).succeed()


def assert_equals(run: Run, expected: Run) -> None:
    assert [row["step"] for row in run.rows] == list(range(1, NUM_STEPS + 1))
    assert repeatable(run.rows) == repeatable(expected.rows)
    assert run.exported_bytes == expected.exported_bytes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_points(undisturbed: Run, tmp_path: Path) -> None:
    rng, number = random.Random(5), 0
    kills = {"rank 0": 0, "rank 1": 0, "all": 0, "nothing": 0}
    with ForkedRanks() as ranks:
        while sum(kills.values()) - kills["nothing"] < NUM_KILLS:
            number += 1
            run = supervised_run(tmp_path / f"disturbed_{number}")
            target = None
            while target != "nothing" and sum(kills.values()) - kills["nothing"] < NUM_KILLS:
                target = disturb(run, ranks, rng)
                kills[target] += 1
            if target != "nothing":
                ranks.start(run.folder)
                assert ranks.wait() == [0, 0], (run.folder / "rank_0.log").read_text()[-4000:]
            assert_equals(run, undisturbed)
    print(f"kills: {kills}, in {number} runs")
    assert min(kills["rank 0"], kills["rank 1"], kills["all"]) >= 5


def mounted(folder: Path, *options: str) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")


@pytest.mark.slow
def test_a_disk_that_is_full_during_a_save_or_read_only(undisturbed: Run, tmp_path: Path) -> None:
    """The run ends in one line with the disk's own words; with room it goes on from the checkpoint before."""
    run = supervised_run(tmp_path)
    disk = tmp_path / "runs"
    disk.mkdir()
    # A checkpoint has 2.1 MB: two are kept, and a third is begun.
    mounted(disk, "size=5m")
    try:
        with ForkedRanks() as ranks:
            ranks.start(tmp_path)
            assert ranks.wait() == [2, 2]
            said = (tmp_path / "rank_0.log").read_text().splitlines()[-1]
            assert re.fullmatch(
                r"megatron-rl: error: \S+: the checkpoint of step (6|8) cannot be written: rank [01]: .*No space left"
                r".*; earlier ones are as they were",
                said,
            ), said
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            ranks.start(tmp_path)
            assert ranks.wait() == [2, 2]
            said = (tmp_path / "rank_0.log").read_text().splitlines()[-1]
            assert said.startswith(
                "megatron-rl: error: runs/run: the run's folder cannot be written: [Errno 30] Read-only"
            )
            subprocess.run(["mount", "-o", "remount,rw,size=64m", disk], check=True)
            ranks.start(tmp_path)
            assert ranks.wait() == [0, 0], (tmp_path / "rank_0.log").read_text()[-4000:]
        assert_equals(run, undisturbed)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    """The watchdogs of the others notice; the run ends with one line, and goes on when it is started again."""
    run = Run(tmp_path, watchdog={"phase_minutes": 0.3, "phase_limits": {"start": 10.0}, "heartbeat_seconds": 0.5})
    process = run.start_and_stop_inside("trainer/rl.py:generate", after_rows=3)
    try:
        _, errors = process.communicate(timeout=200)
    finally:
        kill(process)
    assert process.returncode == EXIT_HANG
    last = errors.rstrip().rpartition("\n")[2]
    assert last.startswith("megatron-rl: rank 0 is silent for ")
    assert "rank 1 waits for it in " in last
    assert last.endswith("stacks are in runs/run/logs/hang")
    stacks = (run.directory.hang_dir / "rank_1.txt").read_text()
    assert "distributed_c10d.py" in stacks
    assert "trainer/rollouts.py" in stacks
    doctor = run.finish_command("doctor", "runs/run")
    assert doctor.code == 0
    assert "condition   hung, and was ended: rank 0 is silent" in doctor.stdout
    # Written by then, but completed only where all ranks meet, which is after the step that hung.
    assert "checkpoint  none, of 0 on disk; .iter_0000002.partial was cut short" in doctor.stdout
    run.succeed()
    assert repeatable(run.rows) == repeatable(reference().rows)
    assert run.exported_bytes == reference().exported_bytes
