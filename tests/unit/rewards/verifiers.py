"""Reward functions as users write them, some of them badly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_rl.rewards.score import Score


def obedient(*, completion: str, scale: float = 1.0) -> float:
    """Does what the completion says."""
    verb, _, argument = completion.partition(" ")
    if verb == "sleep":
        time.sleep(float(argument))
    if verb == "spawn":  # a child that outlives its parent, unless it is ended with it
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(argument).write_text(str(child.pid))
        time.sleep(600)
    if verb == "eat":
        return float(len(bytearray(int(float(argument) * 2**30))))
    if verb == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if verb == "raise":
        raise KeyError(argument)
    if verb == "text":
        return argument  # type: ignore[return-value]
    if verb == "print":
        print("noise")
    if verb == "nan":
        return float("nan")
    return scale * len(completion)


def noted(*, completion: str) -> Score:
    """A number with notes."""
    return Score(0.5, {"verdict": completion})
