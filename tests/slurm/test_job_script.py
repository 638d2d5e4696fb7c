"""What `slurm/train.sbatch` does with the ends that a run can have, on two nodes; the program is a stand-in."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, until

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"

# Ends as its number of starts in this folder says; prints where it is and what it was given.
PROGRAM = """
import os, sys, time
task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
def starts(rank):
    file = f"starts_{rank}_{task}"
    return len(open(file).read()) if os.path.exists(file) else 0
number = starts(os.environ["SLURM_PROCID"])
open(f"starts_{os.environ['SLURM_PROCID']}_{task}", "a").write("x")
while min(starts(0), starts(1)) <= number:  # the first to fail ends the other, which must have been counted
    time.sleep(0.01)
print("rank", os.environ["SLURM_PROCID"], "of", os.environ["SLURM_NTASKS"], "on", os.environ["SLURMD_NODENAME"],
      *sys.argv[1:], flush=True)
codes = [int(code) for code in os.environ["CODES"].split(",")]
code = codes[min(number, len(codes) - 1)]
if code and os.environ["SLURM_PROCID"] == "0":
    time.sleep(30)  # is ended with the one that fails
if os.environ.get("SAVES"):
    open(os.environ["MEGATRON_RL_ATTEMPT_LOGS"] + "/saved", "w").close()
if code in (2, 75):
    open(os.environ["MEGATRON_RL_ATTEMPT_LOGS"] + "/exit_code", "w").write(str(code))
sys.exit(code)
"""


def submit(cluster: Cluster, folder: Path, codes: str, *options: str, arguments: tuple[str, ...] = ("c.yaml",)) -> str:
    (folder / "program.py").write_text(PROGRAM)
    return cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", *options, str(SCRIPT), *arguments,
        cwd=folder, MEGATRON_RL=f"{sys.executable} program.py", CODES=codes,
    )  # fmt: skip


def logs(folder: Path) -> dict[str, str]:
    """Attempt/file -> content."""
    return {f"{file.parent.name}/{file.name}": file.read_text() for file in folder.glob("slurm_logs/*/*/*.log")}


def test_two_nodes_have_a_rank_each_and_a_log_each(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "0", arguments=("c.yaml", "a=1", "b=[1, 2]"))
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert logs(tmp_path) == {
        f"attempt_0.0/rank_{rank}.log": f"rank {rank} of 2 on n{rank} train c.yaml a=1 b=[1, 2]\n" for rank in (0, 1)
    }


def test_a_run_that_has_saved_is_queued_again(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "75,0")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert sorted({name.split("/")[0] for name in logs(tmp_path)}) == ["attempt_0.0", "attempt_1.0"]


def test_a_run_that_crashes_is_started_again_but_not_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "always").mkdir()
    once = submit(cluster, tmp_path / "once", "1,0")
    always = submit(cluster, tmp_path / "always", "137", "--export=ALL,MEGATRON_RL_MAX_RESTARTS=1")
    assert cluster.wait(once)["JobState"] == "COMPLETED"
    ended = cluster.wait(always)
    assert ended["JobState"] == "FAILED"
    assert sorted({name.split("/")[0] for name in logs(tmp_path / "always")}) == ["attempt_0.0", "attempt_0.1"]


def test_failures_are_counted_since_the_last_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "1,1,1,0", "--export=ALL,MEGATRON_RL_MAX_RESTARTS=1,SAVES=1")
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert sorted({name.split("/")[0] for name in logs(tmp_path)}) == [f"attempt_0.{start}" for start in range(4)]


def test_a_users_mistake_is_not_repeated(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "2")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert {name.split("/")[0] for name in logs(tmp_path)} == {"attempt_0.0"}


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """Its ranks save and ask for another start, as on any SIGTERM."""
    (tmp_path / "program.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "open('started', 'w').close()\ntime.sleep(60)\n"
    )
    job = cluster.submit(str(SCRIPT), "c.yaml", cwd=tmp_path, MEGATRON_RL=f"{sys.executable} program.py")
    until((tmp_path / "started").exists, "the start")
    cluster.call("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"


def test_an_array_gives_each_task_its_settings(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(
        cluster, tmp_path, "0", "--array=0-1",
        arguments=("c.yaml", "seed=3", "--", "name=low", "lr=1", "--", "name=high", "lr=2"),
    )  # fmt: skip
    for task in (0, 1):
        assert cluster.wait(f"{job}_{task}")["JobState"] == "COMPLETED"
    given = {file.parts[-3]: file.read_text().split("train ")[1] for file in tmp_path.glob("slurm_logs/*/*/rank_0.log")}
    assert given == {
        f"job_{job}_0": "c.yaml seed=3 name=low lr=1\n",
        f"job_{job}_1": "c.yaml seed=3 name=high lr=2\n",
    }


def test_evaluations_and_conversions_are_jobs_too(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import os, sys\nprint(os.environ['SLURM_PROCID'], *sys.argv[1:])")
    program = {"MEGATRON_RL": f"{sys.executable} program.py"}
    evaluate, convert = (str(SCRIPT.with_name(f"{name}.sbatch")) for name in ("evaluate", "convert"))
    sets = ("c.yaml", "seed=3", "--", "name=low", "--", "name=high", "lr=2")
    array = cluster.submit(
        "--array=0-1", "--nodes=2", "--ntasks-per-node=1", "--output=evaluate_%a", evaluate, *sets,
        cwd=tmp_path, **program,
    )  # fmt: skip
    one = cluster.submit("--output=convert", convert, "megatron-to-hf", "--output", "x", cwd=tmp_path, **program)
    for job in (f"{array}_0", f"{array}_1", one):
        assert cluster.wait(job)["JobState"] == "COMPLETED"
    shown = {
        name: sorted((tmp_path / name).read_text().splitlines()) for name in ("evaluate_0", "evaluate_1", "convert")
    }
    assert shown == {
        "evaluate_0": [f"{rank} evaluate c.yaml seed=3 name=low" for rank in (0, 1)],
        "evaluate_1": [f"{rank} evaluate c.yaml seed=3 name=high lr=2" for rank in (0, 1)],
        "convert": ["0 convert megatron-to-hf --output x"],
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "rank_%t.log --open-mode=append megatron-rl train c.yaml a=1"),
        (
            {"MEGATRON_RL_CONTAINER": "i.sqsh", "MEGATRON_RL_MOUNTS": "/data:/data,/m:/m"},
            "--container-image=i.sqsh --container-mounts={cwd}:{cwd},/data:/data,/m:/m --container-workdir={cwd} "
            "megatron-rl train c.yaml a=1",
        ),
        (
            {"MEGATRON_RL_CONTAINER": "i.sif", "MEGATRON_RL_CONTAINER_RUNTIME": "apptainer"},
            "apptainer exec --nv --bind {cwd}:{cwd} --pwd {cwd} i.sif megatron-rl train c.yaml a=1",
        ),
        ({"SLURM_ARRAY_TASK_ID": "1", "MEGATRON_RL": "python -m x"}, "python -m x train c.yaml a=1 b=3"),
    ],
)
def test_a_dry_run_shows_the_command(environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--dry-run", "c.yaml", "a=1", "--", "b=2", "--", "b=3"]
    path = {"PATH": "/usr/bin:/bin"}
    shown = subprocess.run(command, cwd=tmp_path, env=path | environment, capture_output=True, text=True, check=True)
    assert expected.format(cwd=tmp_path) in shown.stdout.replace("\\", "")
    assert not any(tmp_path.iterdir())
