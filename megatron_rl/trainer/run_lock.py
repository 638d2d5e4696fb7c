"""One run in a folder at a time.

The lock is the kernel's, on `<run>/.lock`: it ends with the process that holds it, however that ends. Its file says who
that is. On network file systems it holds between machines; where a file system has no locks at all, none is taken.
"""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from megatron_rl.config.errors import UserError

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
