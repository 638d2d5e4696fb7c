"""Shared memory of a process group that is to be killed: what only its own exit would have removed.

vLLM's workers talk through segments and semaphores in /dev/shm, each removed by the process that made it. A server is
ended with SIGKILL, which removes nothing, and so a run that restarts engines would fill the memory of its node.
"""

import contextlib
import os
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")


def segments_of(group: int) -> set[Path]:
    """Files directly in /dev/shm that a living process of the group has mapped.

    Args:
        group: id of a process group whose processes share these files with nobody outside of it. Files in folders of
            /dev/shm, where weights travel, are not among them.
    """
    found = set()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # not a process, another user's, or it has just ended
            if os.getpgid(int(process.name)) == group:
                for line in (process / "maps").read_text().splitlines():
                    path = Path(line.partition("/")[1] + line.partition("/")[2])
                    if path.parent == _SHARED_MEMORY:
                        found.add(path)
    return found


def remove(segments: set[Path]) -> None:
    """Remove them. Those that are gone, or cannot be removed, are no matter: the group must end all the same."""
    for path in segments:
        with contextlib.suppress(OSError):
            path.unlink()
