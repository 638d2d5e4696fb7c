"""Run a function on several gloo ranks of this machine: `run_ranks(function, num_ranks, *args)`.

Each rank is a process of its own. All are forked from a server that has imported torch, Megatron-Core and the engine,
and has done nothing else: no thread runs in it, no process group was ever made. So a rank begins as one that torchrun
started, only without the five seconds of imports; of the test's own process it inherits nothing but the environment.
The ranks meet through a file, so no port is taken. Results and tracebacks also come back as files: they outlive a rank
that was killed, and the time of a traceback's file says which rank failed first; the others usually fail in its wake.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

_START_UP_S = 120.0
"""Time for a rank to import torch on a busy machine, before its own limit begins."""
_GRACE_S = 2.0
"""Time for the other ranks to say where they stand once one has failed."""


class RankFailed(RuntimeError):
    """A rank raised, hung or died; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call function(rank, *args) on every rank of a gloo world; return the results in rank order.

    Args:
        function: top-level function of an importable module. Arguments and results are pickled. The default process
            group exists while it runs, and RANK, LOCAL_RANK and WORLD_SIZE are set; every rank has one thread.
        num_ranks: size of the world, >= 1.
        timeout_s: limit of the whole call in each rank, and of each collective in it, seconds.

    Raises:
        RankFailed: with the tracebacks, of the rank that failed first in front; of a rank that hung, where it stood.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.training_ranks"])
        given = (num_ranks, folder, timeout_s, dict(os.environ), function, args)
        ranks = [context.Process(target=_rank_main, args=(rank, *given)) for rank in range(num_ranks)]
        try:
            _start(ranks)
            _join(ranks, Path(folder), time.monotonic() + timeout_s + _START_UP_S)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
        return [pickle.loads(Path(folder, f"result_{rank}").read_bytes()) for rank in range(num_ranks)]


def _rank_main(
    rank: int,
    num_ranks: int,
    folder: str,
    timeout_s: float,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), OMP_NUM_THREADS="1")
    with open(Path(folder, f"error_{rank}"), "w") as error, contextlib.ExitStack() as stack:
        stack.push(lambda kind, value, trace: traceback.print_exception(kind, value, trace, file=error))
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=error)
        stack.callback(faulthandler.cancel_dump_traceback_later)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        # Not through a multiprocessing queue, which would hand tensors over as handles into a process that exits.
        Path(folder, f"result_{rank}").write_bytes(pickle.dumps(function(rank, *args)))
        dist.barrier()  # A rank that leaves early closes connections on which the others still wait.
        dist.destroy_process_group()


def _start(ranks: Sequence[BaseProcess]) -> None:
    """Start the ranks with one OpenMP thread each. OpenMP reads its variable when torch is loaded: in the server, which
    starts with the first rank of all."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        for process in ranks:
            process.start()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _join(ranks: Sequence[BaseProcess], folder: Path, deadline: float) -> None:
    while running := {rank: process.sentinel for rank, process in enumerate(ranks) if process.is_alive()}:
        if not wait(running.values(), timeout=max(0.0, deadline - time.monotonic())):
            raise RankFailed(f"ranks {list(running)} did not end")
        if any(process.exitcode for process in ranks):
            break
    if any(process.exitcode for process in ranks):
        grace = time.monotonic() + _GRACE_S
        for process in ranks:
            process.join(max(0.0, grace - time.monotonic()))
        raise RankFailed(_tracebacks(ranks, folder))


def _tracebacks(ranks: Sequence[BaseProcess], folder: Path) -> str:
    """All tracebacks, that of the rank that failed first in front."""
    written = [path for path in folder.glob("error_*") if path.stat().st_size > 0]
    if not written:
        return f"no traceback; exit codes by rank: {[process.exitcode for process in ranks]}"
    written.sort(key=lambda path: path.stat().st_mtime_ns)
    texts = [f"rank {path.name.removeprefix('error_')} of {len(ranks)}:\n{path.read_text()}" for path in written]
    return "first failed " + "then ".join(texts)
