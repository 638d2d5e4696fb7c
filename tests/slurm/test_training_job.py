"""GRPO as a Slurm job over two nodes: whatever ends an attempt, the job comes back and ends as an undisturbed run."""

import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.e2e.runs import Run, reference, repeatable
from tests.slurm.cluster import Cluster, until
from tests.slurm.test_job_script import SCRIPT

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    "MEGATRON_RL": f"{sys.executable} -m megatron_rl",
    "PYTHONPATH": str(REPOSITORY),
    "MASTER_ADDR": "127.0.0.1",  # the names of the nodes are Slurm's alone
    "OMP_NUM_THREADS": "1",
}


def submit(cluster: Cluster, run: Run, *options: str, **environment: str) -> str:
    return cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", *options, str(SCRIPT), "run.yaml",
        cwd=run.folder, **ENVIRONMENT, **environment,
    )  # fmt: skip


def is_under_way(run: Run, num_rows: int = 2) -> bool:
    return run.directory.metrics_file.exists() and len(run.rows) >= num_rows


def assert_equal(run: Run, expected: Run) -> None:
    assert repeatable(run.rows) == repeatable(expected.rows)
    assert run.exported_bytes == expected.exported_bytes


def told_to_save(cluster: Cluster, job: str) -> None:
    cluster.call("scancel", "--signal=USR1", job)


def requeued(cluster: Cluster, job: str) -> None:
    cluster.call("scontrol", "requeue", job)


def node_lost(cluster: Cluster, job: str) -> None:
    cluster.call("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    until(lambda: cluster.job(job)["JobState"] == "PENDING", "the job to be queued again")
    cluster.call("scontrol", "update", "nodename=n1", "state=resume")


def preempted(cluster: Cluster, job: str) -> None:
    cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--time=1", "--wrap=true", cwd=cluster.folder)


@pytest.mark.parametrize("event", [None, told_to_save, requeued, node_lost, preempted])
def test_the_job_ends_as_the_undisturbed_run(
    cluster: Cluster, tmp_path: Path, event: Callable[[Cluster, str], None] | None
) -> None:
    run = Run(tmp_path)
    job = submit(cluster, run, RUN_SLEEPS="0.2" if event else "0")
    if event is not None:
        until(lambda: is_under_way(run), "the second row of metrics", 300.0)
        event(cluster, job)
    ended = cluster.wait(job, timeout_s=600.0)
    assert ended["JobState"] == "COMPLETED"
    assert ended["Restarts"] == ("0" if event is None else "1")
    assert_equal(run, reference())


def test_before_the_time_limit_the_job_saves_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint={"save_interval": 0})  # nothing is saved but at the end, or when told to
    # Told 90 s after the start; the four steps take 24 s each or more. An attempt may also be told while it starts.
    job = submit(cluster, run, "--time=3", "--signal=USR1@90", RUN_SLEEPS="4")
    ended = cluster.wait(job, timeout_s=900.0)
    assert ended["JobState"] == "COMPLETED"
    assert int(ended["Restarts"]) >= 1
    assert_equal(run, reference())


def test_data_parallel_over_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    parallel = {"tensor_model_parallel_size": 1, "data_parallel_size": 2}
    here = Run(tmp_path / "here", parallel=parallel).succeed()
    job = Run(tmp_path / "job", parallel=parallel)
    number = submit(cluster, job, RUN_SLEEPS="0.2")
    until(lambda: is_under_way(job), "the second row of metrics", 300.0)
    cluster.call("scancel", "--signal=TERM", number)
    ended = cluster.wait(number, timeout_s=600.0)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert_equal(job, here)


def of_job(number: str) -> list[psutil.Process]:
    """What runs in a job, its batch script aside."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if environment.get("SLURM_JOB_ID") == number and "SLURM_STEP_NUM_TASKS" in environment:
            found.append(process)
    return found


def engine_server(number: str) -> psutil.Process:
    """The vLLM server of a job with one engine."""
    (server,) = (one for one in of_job(number) if "vllm.entrypoints.openai.api_server" in one.cmdline())
    return server


def test_an_engine_on_a_node_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    """Node n0 trains, node n1 generates. The engine is killed, later the job is told to save; nothing of it is left in
    the numbers, which are those of one machine, where the rank starts the engine itself."""
    sections = {
        "parallel": {"tensor_model_parallel_size": 1},
        "rollout": {"placement": "disaggregated", "num_engines": 1},
        "train": {"num_steps": 6},
        "sync": {"verify": "full", "transport": "network"},  # as between machines, which these two nodes are not
    }
    here = Run(tmp_path / "here", **sections).succeed()
    run = Run(tmp_path / "job", **sections)
    job = submit(cluster, run, RUN_SLEEPS="0.2")
    until(lambda: is_under_way(run), "the second row of metrics", 300.0)
    server = engine_server(job)
    assert server.environ()["SLURMD_NODENAME"] == "n1"
    (published,) = run.directory.logs_dir.glob(f"engines/{job}.*/engine_0.json")
    assert stat.S_IMODE(published.stat().st_mode) == 0o600
    token = json.loads(published.read_text())["token"]
    assert token == server.environ()["MEGATRON_RL_ENGINE_TOKEN"]
    assert not any(token in " ".join(process.cmdline()) for process in psutil.process_iter())
    os.killpg(server.pid, signal.SIGKILL)
    killed_at = len(run.rows)
    until(lambda: is_under_way(run, killed_at + 1), "a step after the engine's death", 300.0)
    assert engine_server(job).pid != server.pid
    assert cluster.job(job)["Restarts"] == "0"
    cluster.call("scancel", "--signal=USR1", job)
    ended = cluster.wait(job, timeout_s=600.0)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert run.exported_bytes == here.exported_bytes
    trained = [row for row in run.rows if "sync/version" in row]
    assert [row["sync/version"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert all(row["staleness/max"] == 0 for row in trained)
    assert not of_job(job)
