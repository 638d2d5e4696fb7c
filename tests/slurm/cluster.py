"""A Slurm cluster of two nodes on this machine: a controller and two node daemons, with everything in one folder.

It uses Debian's packages slurm-wlm and munge, and nothing of their configuration: no service of the machine is started
or changed. A job that is queued again waits until its credential has expired, 5 seconds here (the least that Slurm
takes) and not two minutes. `tools/install_test_programs.sh` installs them.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NODES = ("n0", "n1")
_PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=5
OverTimeLimit=0
MpiDefault=none
JobRequeue=1
SlurmdTimeout=60
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 State=UNKNOWN
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[0-1] MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str | None:
    """What keeps a cluster from being started here."""
    if os.geteuid() != 0:
        return "a Slurm cluster of one's own needs root"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"slurm-wlm and munge are not installed: no {', '.join(absent)}" if absent else None


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a command of Slurm and return what it prints."""
        inherited = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "MEGATRON_RL"))}
        own = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(
            command, cwd=cwd, env=inherited | own | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """sbatch; the job's number."""
        printed = self.call("sbatch", "--parsable", *arguments, cwd=cwd, **environment)
        return printed.strip().split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", number)))

    def wait(self, number: str, *, timeout_s: float = 400.0) -> dict[str, str]:
        """Wait until a job has ended for good."""
        until(lambda: self.job(number)["JobState"] in _ENDED, f"the end of job {number}", timeout_s)
        return self.job(number)


_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    """Wait for something, with a limit."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """A cluster in an empty folder, ended with the context."""
    (folder / "state").mkdir()
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    first = _free_neighbours()
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            host=socket.gethostname(), folder=folder, port=_free_port(), first=first, last=first + len(NODES) - 1
        )
    )
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    munged = [f"--{option}={folder / name}" for option, name in files.items()]
    cluster = Cluster(folder)
    try:
        cluster.call("munged", "--force", *munged, f"--seed-file={folder}/munged.seed")
        cluster.call("slurmctld", "-c")
        for node in NODES:
            cluster.call("slurmd", "-N", node, "-c")
        show = ("sinfo", "--Node", "--partition=main", "--noheader", "--format=%T")
        until(lambda: cluster.call(*show).split() == ["idle"] * len(NODES), "idle nodes", 60.0)
        yield cluster
    finally:
        _end([folder / name for name in ("slurmctld.pid", *(f"slurmd-{node}.pid" for node in NODES), "munged.pid")])


def _end(pid_files: Sequence[Path]) -> None:
    """End daemons, and wait until they are gone: they may still write."""
    pids = [int(file.read_text()) for file in pid_files if file.exists()]
    for number in (signal.SIGTERM, signal.SIGKILL):  # a controller takes its time to end, with nothing to save here
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.05)


def _free_neighbours() -> int:
    """The first of two free ports that follow each other."""
    for first in range(27001, 28000, 2):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + len(NODES)):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
