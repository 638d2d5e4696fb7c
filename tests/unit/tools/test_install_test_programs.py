"""What the script asks apt-get for, and what it says where it cannot; with a PATH of stand-ins."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "install_test_programs.sh"
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "chromium")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder of programs: what the script itself needs, root's `id`, and an apt-get that notes its arguments."""
    for name in ("env", "bash", "mktemp", "tail", "rm", "timeout"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    write(tmp_path / "id", "echo 0")
    write(tmp_path / "apt-get", f'echo "$@" >> {tmp_path}/calls')
    return tmp_path


def write(file: Path, line: str) -> None:
    file.write_text(f"#!/usr/bin/env bash\n{line}\n")
    file.chmod(0o755)


def install(path: Path) -> tuple[list[str], str]:
    """(calls of apt-get, stderr)."""
    done = subprocess.run(
        [str(path / "bash"), str(SCRIPT)], env={"PATH": str(path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    calls = path / "calls"
    return calls.read_text().splitlines() if calls.exists() else [], done.stderr


def test_where_all_is_there_nothing_is_called(path: Path) -> None:
    for name in PROGRAMS:
        write(path / name, "true")
    assert install(path) == ([], "")


@pytest.mark.parametrize(
    ("missing", "packages"),
    [(PROGRAMS, ["slurm-wlm", "munge", "chromium"]), (("slurmd",), ["slurm-wlm"]), (("chromium",), ["chromium"])],
)
def test_only_what_is_missing_is_installed_after_one_update(
    path: Path, missing: tuple[str, ...], packages: list[str]
) -> None:
    for name in set(PROGRAMS) - set(missing):
        write(path / name, "true")
    calls, said = install(path)
    assert calls == ["update", *(f"install --yes --no-install-recommends {package}" for package in packages)]
    assert said == ""


def test_what_cannot_be_installed_is_told(path: Path) -> None:
    write(path / "apt-get", '[ "$1" = update ] || { echo "E: no room"; exit 100; }')
    _, said = install(path)
    assert said.count("will be skipped: apt-get install failed:\nE: no room") == 3
    write(path / "id", "echo 1000")
    calls, said = install(path)
    assert calls == []
    assert said.startswith("Tests of slurm-wlm munge chromium will be skipped: not installed")
