"""A process that calls reward functions: `python -m megatron_rl.rewards.worker MEMORY_BYTES`; see `pool`.

It reads functions and calls, pickled, from its parent, and answers with a line of JSON each: what was returned, or what
was raised. A function's answer is never unpickled by the parent. What functions print goes to stderr. It imports
neither torch nor Megatron, so it starts in a fraction of a second.
"""

import contextlib
import ctypes
import json
import os
import pickle
import resource
import signal
import struct
import sys
from numbers import Real
from typing import Any, BinaryIO

from megatron_rl.config.functions import cause

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve calls until the parent closes the pipe or dies."""
    with contextlib.suppress(OSError):  # not Linux: the closed pipe ends it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Slurm tells every process of a job to stop, not the ranks alone. A step that is being finished needs its rewards.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    limit = int(sys.argv[1])
    if limit:
        # Data, not address space: libraries reserve many times what they use.
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    requests = sys.stdin.buffer
    sys.path[:] = read_message(requests)
    answers.write(b'{"ready": true}\n')
    while True:
        try:
            call, sample = read_message(requests)
        except EOFError:
            return
        answers.write(json.dumps(_answer(call, sample)).encode() + b"\n")


def _answer(call: Any, sample: dict[str, Any]) -> dict[str, Any]:
    try:
        value = call(**sample)
    except MemoryError:
        return {"lost": "ran out of memory"}
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises is told to the parent
        return {"raised": cause(error)}
    if not isinstance(value, float | Real) and getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = value.item()
    if isinstance(value, float | Real):
        try:
            return {"value": float(value), "notes": getattr(value, "notes", {})}
        except OverflowError:  # an integer beyond any float
            pass
    return {"returned": repr(value)[:200], "type": type(value).__name__}


def write_message(stream: BinaryIO, message: Any) -> None:
    """A pickle with its length before it."""
    content = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def read_message(stream: BinaryIO) -> Any:
    """The next message of `write_message`.

    Raises:
        EOFError: the other side has closed.
    """
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<Q", header)[0]))


if __name__ == "__main__":
    main()
