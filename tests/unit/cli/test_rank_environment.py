"""Which environment makes a process a rank, and what Slurm's variables become."""

import pytest

from megatron_rl.cli.rank_environment import EnvironmentVariableError, first_host, rank_variables

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1234"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "1000",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


def test_no_launcher() -> None:
    assert rank_variables({"PATH": "x"}) is None


def test_torchrun_comes_before_slurm() -> None:
    assert rank_variables(TORCHRUN | {"PATH": "x"}) == TORCHRUN
    assert rank_variables(SRUN | TORCHRUN) == TORCHRUN


def test_srun() -> None:
    # Port: 20000 + (1000 * 31 + 2) mod 12000 = 20000 + 31002 - 24000 = 27002
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07", "MASTER_PORT": "27002"}
    assert rank_variables(SRUN) == expected
    of_step = rank_variables(SRUN | {"SLURM_STEP_NODELIST": "gpu08", "MASTER_PORT": "5"})
    assert of_step == expected | {"MASTER_ADDR": "gpu08", "MASTER_PORT": "5"}


def test_a_batch_script_and_a_single_task_are_no_ranks() -> None:
    batch = {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")} | {"SLURM_PROCID": "0"}
    assert rank_variables(batch) is None
    assert rank_variables(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n0", "n0"),
        ("n0,n1", "n0"),
        ("n[0-1]", "n0"),
        ("gpu[007,009-012]", "gpu007"),
        ("gpu[003-007,9]-ib,login", "gpu003-ib"),
        ("r[1-2]n[3,5]", "r1n3"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set, though RANK, WORLD_SIZE is"),
        (TORCHRUN | {"RANK": "x"}, "RANK: given 'x', allowed: a number >= 0"),
        (TORCHRUN | {"RANK": "4"}, "RANK: given 4, allowed: less than WORLD_SIZE 4"),
        (SRUN | {"SLURM_JOB_NODELIST": ""}, "SLURM_STEP_NODELIST: not set, though SLURM_PROCID is"),
        (SRUN | {"SLURM_JOB_NODELIST": ","}, "SLURM_STEP_NODELIST: given ',', allowed: a Slurm node list"),
    ],
)
def test_contradictions(environment: dict[str, str], message: str) -> None:
    with pytest.raises(EnvironmentVariableError) as caught:
        rank_variables(environment)
    assert str(caught.value) == message
