"""Faults at random points, by real signals: nothing is lost but the steps since the last checkpoint, nothing done
twice.

What is compared at the end is what an undisturbed run leaves: all metrics but times, and the bytes of the weights. A
row that is missing, doubled or from another past would show in the first, a step made twice in both.
"""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config.errors import EXIT_HANG
from tests.e2e.runs import Run, kill, reference, repeatable

NUM_KILLS = 50
NUM_STEPS = 120

SUPERVISED: dict[str, dict[str, Any]] = {
    "data": {"train": "sft.jsonl", "eval": None, "max_prompt_tokens": 16},
    "evaluation": {"interval": 0},
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


def rank_process(process: "subprocess.Popen[str]", rank: int) -> psutil.Process | None:
    for child in psutil.Process(process.pid).children():
        try:
            if child.environ().get("RANK") == str(rank):
                return child
        except psutil.Error:
            continue
    return None


def num_rows(run: Run) -> int:
    return len(run.rows) if run.directory.metrics_file.exists() else 0


def disturb(run: Run, rng: random.Random) -> str:
    """Start the run and kill something of it a random while after it has made a step; what was killed."""
    process = run.start()
    before, deadline = num_rows(run), time.monotonic() + 120.0
    try:
        while process.poll() is None and num_rows(run) in (before, 0):
            assert time.monotonic() < deadline, "it makes no step"
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
        target = rng.choice(["rank 0", "rank 1", "all"])
        if process.poll() is not None or target == "all":
            return "nothing" if process.poll() is not None else target
        victim = rank_process(process, int(target[-1]))
        if victim is None:
            return "nothing"
        victim.kill()
        process.wait(timeout=60.0)
        assert process.returncode == 128 + signal.SIGKILL, process.returncode
        return target
    finally:
        kill(process)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_points(tmp_path: Path) -> None:
    undisturbed = supervised_run(tmp_path / "undisturbed").succeed()
    rng, kills, number = random.Random(5), {"rank 0": 0, "rank 1": 0, "all": 0, "nothing": 0}, 0
    while sum(kills.values()) - kills["nothing"] < NUM_KILLS:
        number += 1
        run = supervised_run(tmp_path / f"disturbed_{number}")
        while num_rows(run) < NUM_STEPS and sum(kills.values()) - kills["nothing"] < NUM_KILLS:
            kills[disturb(run, rng)] += 1
        run.succeed()
        assert [row["step"] for row in run.rows] == list(range(1, NUM_STEPS + 1))
        assert repeatable(run.rows) == repeatable(undisturbed.rows)
        assert run.exported_bytes == undisturbed.exported_bytes
    print(f"kills: {kills}, in {number} runs")
    assert min(kills["rank 0"], kills["rank 1"], kills["all"]) >= 5


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    """The watchdogs of the others notice; the run ends with one line, and goes on when it is started again."""
    run = Run(tmp_path, watchdog={"phase_minutes": 0.3, "phase_limits": {"start": 10.0}, "heartbeat_seconds": 0.5})
    process = run.start_and_stop_inside("trainer/reinforcement.py:generate", after_rows=3)
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
