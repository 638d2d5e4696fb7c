"""Ranks that start in a second: forked from a process that has imported everything and done nothing.

Each rank is a process of its own that runs the command line of a rank, in a session of its own as under the launcher,
and can be killed as any other. What is saved is the import of torch, Megatron-Core, vLLM and this package, nearly all
of the time of a short run; so a run can be killed and started again fifty times.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from megatron_rl.cli.rank_environment import free_port, rank_of_this_machine

_PARENT = """
import json, os, sys
import megatron_rl.trainer.run
from megatron_rl.cli.main import main
from megatron_rl.rollout.isolation import isolated

with isolated():  # as a rank imports it, see rollout/engine.py
    import megatron_rl.rollout.llm

for line in sys.stdin:
    started = json.loads(line)
    pids = []
    for variables in started["ranks"]:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(started["folder"])
            sys.path.insert(0, started["folder"])
            os.environ.update(variables)
            log = os.open(f"rank_{variables['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.exit(main(["train", "run.yaml"]))
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    codes = {pid: os.waitstatus_to_exitcode(status) for pid, status in (os.wait() for _ in pids)}
    print(json.dumps([codes[pid] for pid in pids]), flush=True)
"""


@dataclass
class ForkedRanks:
    """The process that forks ranks, and the ranks of one run at a time."""

    pids: list[int] = field(default_factory=list)

    def __enter__(self) -> Self:
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PARENT],
            env=inherited | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill(*range(len(self.pids)))
        self._process.kill()
        self._process.wait()

    def start(self, folder: Path, *, num_ranks: int = 2) -> None:
        """Start `megatron-rl train run.yaml` in a folder; its output is in rank_N.log."""
        port = free_port()
        ranks = [rank_of_this_machine(rank, num_ranks, port) for rank in range(num_ranks)]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "ranks": ranks}) + "\n")
        self._process.stdin.flush()
        self.pids = json.loads(self._process.stdout.readline())

    def kill(self, *ranks: int) -> None:
        """SIGKILL to some ranks at once."""
        for rank in ranks:
            if psutil.pid_exists(self.pids[rank]):
                os.kill(self.pids[rank], 9)

    def running(self) -> bool:
        """Whether no rank has ended yet. One that has stays a zombie until all have."""
        return all(_runs(pid) for pid in self.pids)

    def wait(self, timeout_s: float = 300.0) -> list[int]:
        """Exit codes of the ranks, -9 of killed ones; all have ended then."""
        deadline = time.monotonic() + timeout_s
        while any(_runs(pid) for pid in self.pids):
            assert time.monotonic() < deadline, f"ranks {self.pids} do not end"
            time.sleep(0.005)
        assert self._process.stdout is not None
        codes: list[int] = json.loads(self._process.stdout.readline())
        self.pids = []
        return codes


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
