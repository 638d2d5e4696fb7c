"""What `megatron-rl launch slurm` submits."""

import json
import shlex
from pathlib import Path

import pytest

from megatron_rl.cli.launch_slurm import sbatch_command
from megatron_rl.cli.main import main
from megatron_rl.config.schema import Config, SlurmConfig
from tests.e2e.runs import Run


def test_every_setting_becomes_an_option() -> None:
    slurm = SlurmConfig(
        nodes=4, ntasks_per_node=8, gpus_per_node=8, cpus_per_task=14, time="12:00:00", partition="p", account="a",
        qos="q", signal_seconds=300, max_restarts=1, container="i.sqsh", container_mounts="/d:/d,/m:/m",
        environment={"MASTER_PORT": "29500"}, sbatch_args=["--constraint=h200"],
    )  # fmt: skip
    assert shlex.join(sbatch_command(Config(name="x", slurm=slurm), ["c.yaml", "b=[1, 2]"])) == (
        "env MEGATRON_RL_LOGS=runs/x/logs MEGATRON_RL_MAX_RESTARTS=1 MEGATRON_RL_CONTAINER=i.sqsh "
        "MEGATRON_RL_CONTAINER_RUNTIME=pyxis MEGATRON_RL_MOUNTS=/d:/d,/m:/m MASTER_PORT=29500 "
        "sbatch --job-name=x --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14 --time=12:00:00 "
        "--partition=p --account=a --qos=q --signal=USR1@300 --output=runs/x/logs/slurm_%j.out --constraint=h200 "
        "slurm/train.sbatch c.yaml 'b=[1, 2]'"
    )


def test_what_is_not_set_is_left_to_the_cluster() -> None:
    command = shlex.join(sbatch_command(Config(name="x"), ["c.yaml"]))
    assert "--nodes=1 --ntasks-per-node=8 --signal=USR1@180 --output=" in command
    assert "None" not in command


def test_a_dry_run_checks_all_and_shows_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.sbatch").touch()
    own = ["slurm.script=job.sbatch", "slurm.ntasks_per_node=1"]
    launch = ["launch", "slurm", "run.yaml", *own, "--time", "1:00:00", "--dry-run"]
    assert main([*launch, "--nodes", "2"]) == 0
    shown, plan = capsys.readouterr()
    assert plan == "2 tasks: 0-1 train (node 0-1)\n"
    assert "sbatch --job-name=run --nodes=2 --ntasks-per-node=1 --time=1:00:00 --signal=USR1@180" in shown
    assert shown.endswith(f"job.sbatch run.yaml {' '.join(own)}\n")
    assert not run.directory.path.exists()
    # Three nodes cannot hold ranks of tensor parallel 2.
    assert main([*launch, "--nodes", "3"]) == 2
    assert "parallel: given tensor_model_parallel_size 2" in capsys.readouterr().err
    # One trains there, the others are an engine of two.
    apart = ["rollout.placement=disaggregated", "rollout.tensor_model_parallel_size=2"]
    alone = ["parallel.tensor_model_parallel_size=1", "slurm.ntasks_per_node=2"]
    assert main([*launch, *apart, *alone, "--nodes", "2", "parallel.data_parallel_size=2"]) == 0
    assert capsys.readouterr().err == "4 tasks: 0-1 train (node 0); 2-3 engine 0 (node 1)\n"
    assert main([*launch, *apart, *alone[:1], "--nodes", "3"]) == 2
    assert "tasks 1 to 2, engine 0, on two nodes" in capsys.readouterr().err
    missing = ["slurm.script=none.sbatch", "slurm.ntasks_per_node=1"]
    assert main(["launch", "slurm", "run.yaml", *missing, "--nodes", "2", "--dry-run"]) == 2
    assert "slurm.script: given 'none.sbatch', allowed: an existing file" in capsys.readouterr().err
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "x" * 40, "answer": "1"}) + "\n")
    assert main([*launch, "--nodes", "2"]) == 2
    assert "train.jsonl:1" in capsys.readouterr().err
