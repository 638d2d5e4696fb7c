"""Training runs as a user starts them: the real command line in a folder of its own, with a model of 2 layers.

    folder/  run.yaml  model/  train.jsonl  heldout.jsonl  run_rewards.py  runs/run/...

`Run` starts the command, and can stop it inside a chosen function of rank 0, at a chosen step, before killing it. That
needs no seam in the code that is tested: rewards are user code that every rank imports, and the reward module of these
runs watches where the main thread is. There it stops the whole process with SIGSTOP, which nobody can catch or delay,
for the test to kill it. The command line of a stopped run is that of an undisturbed one; the environment says where.
"""

import atexit
import fcntl
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.logs import read_metrics
from tests.e2e.forked_ranks import ForkedRanks
from tools.make_arithmetic import main as make_arithmetic

NUM_STEPS = 4
SAVE_INTERVAL = 2
NUM_PROMPTS, NUM_SAMPLES = 6, 4
MODEL = ["--hidden-size", "128", "--num-layers", "2", "--intermediate-size", "96"]  # 4 heads of 32, 2 key-value heads
DATA = ["--num-sft", "1", "--num-train", "100", "--num-heldout", "8"]

CONFIG: dict[str, Any] = {
    "name": "run",
    "seed": 7,
    "model": {"hf_path": "model", "params_dtype": "float32"},
    "parallel": {"tensor_model_parallel_size": 2},
    "optimizer": {"lr": 1e-3, "lr_decay_style": "linear", "weight_decay": 0.1},
    "data": {"train": "train.jsonl", "eval": "heldout.jsonl", "max_prompt_tokens": 16},
    "rollout": {
        "num_prompts_per_step": NUM_PROMPTS,
        "num_samples_per_prompt": NUM_SAMPLES,
        "sampling": {"temperature": 0.8, "max_response_tokens": 6},
        "max_num_seqs": 32,
        "kv_cache_gigabytes": 0.02,
    },
    "sync": {"verify": "full"},
    "rewards": {"functions": [{"name": "run_rewards:digits"}, {"name": "exact_match", "weight": 0.5}]},
    "algorithm": {"kl": {"coefficient": 0.05}, "entropy_coefficient": 0.01},
    "train": {"num_steps": NUM_STEPS, "micro_batch_tokens": 64},
    "checkpoint": {"save_interval": SAVE_INTERVAL},
    "evaluation": {"interval": 2},
    "logging": {"num_logged_rollouts": 4},
}
"""One update per step, exactly on-policy. Two engines: one per rank."""

# Random weights never give a right answer, but the part of digits in what they write differs from sample to sample.
REWARDS = '''
import math, os, signal, sys, threading, time
from pathlib import Path

METRICS = Path("runs/run/metrics.jsonl")


def num_rows():
    return METRICS.read_bytes().count(b"\\n") if METRICS.exists() else 0


def digits(*, completion):
    """Part of the characters that are digits."""
    time.sleep(float(os.environ.get("RUN_SLEEPS", 0)))
    fails = os.environ.get("RUN_FAILS") if os.environ["RANK"] == "1" and num_rows() > 2 else None
    if fails == "raises":
        raise RuntimeError("no verdict")
    if fails == "nan":
        return math.nan
    return sum(c.isdigit() for c in completion) / max(1, len(completion))


def stop_inside(file, function, rows):
    main = threading.main_thread().ident
    while True:
        time.sleep(0.0005)
        if num_rows() < rows:
            continue
        # From here to the signal this thread holds the interpreter, so the main thread cannot leave the function.
        frame = sys._current_frames()[main]
        while frame is not None:
            if frame.f_code.co_name == function and frame.f_code.co_filename.endswith(file):
                os.kill(os.getpid(), signal.SIGSTOP)
            frame = frame.f_back


if "RUN_STOPS_IN" in os.environ and os.environ.get("RANK") == "0":
    file, function, rows = os.environ["RUN_STOPS_IN"].split(":")
    threading.Thread(target=stop_inside, args=(file, function, int(rows)), daemon=True).start()
'''


class Run:
    """A run in `folder`."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        """A new run in a new folder; `sections` are merged over those of `CONFIG`."""
        self.folder = folder
        self.directory = RunDirectory(folder / "runs" / "run")
        shutil.copytree(material(), folder, dirs_exist_ok=True)
        config = CONFIG | {name: CONFIG.get(name, {}) | section for name, section in sections.items()}
        (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
        (folder / "run_rewards.py").write_text(REWARDS)

    @classmethod
    def at(cls, folder: Path) -> "Run":
        """A run that is in a folder already; nothing is written."""
        run = cls.__new__(cls)
        run.folder, run.directory = folder, RunDirectory(folder / "runs" / "run")
        return run

    def write_teacher(self) -> None:
        """Another model of the policy's size in folder/teacher, for `algorithm.kl.reference_path`."""
        torch.manual_seed(11)
        teacher = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder / "model"))
        # Logits of a few nats, where a model of the usual small weights would be nearly uniform, as the student is.
        with torch.no_grad():
            teacher.get_output_embeddings().weight.mul_(10)
        teacher.save_pretrained(self.folder / "teacher")

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.directory.metrics_file)

    @property
    def exported_bytes(self) -> bytes:
        """The weights file of the exported checkpoint."""
        return (self.directory.hf_dir / "model.safetensors").read_bytes()

    def start(self, command: str = "train", **environment: str) -> "subprocess.Popen[str]":
        """Start the command line."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_rl", command, "run.yaml"],
            cwd=self.folder,
            env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, command: str = "train", **environment: str) -> "Ended":
        """Run the command line to its end."""
        process = self.start(command, **environment)
        try:
            stdout, stderr = process.communicate(timeout=300)
        finally:
            kill(process)
        return Ended(process.returncode, stdout, stderr)

    def finish_command(self, *command: str) -> "Ended":
        """Run another command in the folder."""
        arguments = [sys.executable, "-m", "megatron_rl", *command]
        ended = subprocess.run(arguments, cwd=self.folder, capture_output=True, text=True, timeout=120)
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def succeed(self) -> "Run":
        """Train to the end, which must be a good one."""
        ended = self.finish()
        assert ended.code == 0, ended.stderr[-4000:]
        return self

    def train_forked(self) -> "Run":
        """Train to the end, which must be a good one, in ranks that need not import anything: without the launcher."""
        sizes = json.loads((self.folder / "run.yaml").read_text())["parallel"]
        kinds = ("tensor_model", "pipeline_model", "context", "data")
        ranks = _forked_ranks()
        ranks.start(self.folder, num_ranks=math.prod(sizes.get(f"{kind}_parallel_size", 1) for kind in kinds))
        try:
            codes = ranks.wait()
        except BaseException:
            ranks.kill(*range(len(ranks.pids)))
            raise
        logs = (self.folder / f"rank_{rank}.log" for rank in range(len(codes)))
        assert not any(codes), "\n".join(log.read_text()[-4000:] for log in logs)
        return self

    def kill_inside(self, place: str, *, after_rows: int) -> None:
        """Train until rank 0 is in a function, and end everything there with SIGKILL: launcher, ranks and guard.

        Args:
            place: 'file.py:function'; the file is matched from its end.
            after_rows: metrics.jsonl has at least this many rows by then.
        """
        kill(self.start_and_stop_inside(place, after_rows=after_rows))

    def start_and_stop_inside(self, place: str, *, after_rows: int) -> "subprocess.Popen[str]":
        """Train until rank 0 is in a function, and leave it stopped there."""
        process = self.start(RUN_STOPS_IN=f"{place}:{after_rows}")
        try:
            deadline = time.monotonic() + 300
            while not any(_is_stopped(child) for child in _descendants(process)):
                assert process.poll() is None, f"ended before it was in {place}: {_stderr(process)[-4000:]}"
                assert time.monotonic() < deadline, f"never in {place}"
                time.sleep(0.01)
        except BaseException:
            kill(process)
            raise
        return process


@dataclass(frozen=True)
class Ended:
    """A command line that came to an end."""

    code: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """Of stderr."""
        return self.stderr.rstrip().rpartition("\n")[2]


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL a started command with all its descendants, and wait until they are gone."""
    family = [*_descendants(process), process]
    for member in family:
        if member.poll() is None if isinstance(member, subprocess.Popen) else member.is_running():
            member.kill()
    psutil.wait_procs([member for member in family if isinstance(member, psutil.Process)], timeout=30)
    process.communicate()


def continue_until_it_ends(process: "subprocess.Popen[str]") -> None:
    """Let a stopped run go on, each time that it is stopped again."""
    deadline = time.monotonic() + 300
    while process.poll() is None:
        assert time.monotonic() < deadline, "it does not end"
        for child in _descendants(process):
            if _is_stopped(child):
                child.resume()
        time.sleep(0.01)


def _descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    if process.poll() is not None:
        return []
    return psutil.Process(process.pid).children(recursive=True)


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:  # ended since it was listed
        return False


def _stderr(process: "subprocess.Popen[str]") -> str:
    return process.communicate()[1]


def repeatable(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of metrics without what a clock decides."""
    return [{name: value for name, value in row.items() if not _is_timing(name)} for row in rows]


def _is_timing(name: str) -> bool:
    return name.startswith(("timing_s/", "throughput/tokens_per_second")) or name == "sync/seconds"


@functools.cache
def material() -> Path:
    """Folder with model/, train.jsonl and heldout.jsonl; made once per session."""
    return _made_once("material", lambda folder: make_arithmetic([str(folder), *MODEL, *DATA]))


@functools.cache
def reference() -> Run:
    """The run of `CONFIG`, undisturbed; trained once per session and not to be changed."""
    return Run.at(_made_once("reference", lambda folder: Run(folder).succeed()))


@functools.cache
def _forked_ranks() -> ForkedRanks:
    ranks = ForkedRanks().__enter__()
    atexit.register(ranks.__exit__, None, None, None)
    return ranks


def _made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of pytest's worker processes fills, while the others wait."""
    session = Path(os.environ["TESTS_SESSION_FOLDER"])  # set in tests/conftest.py
    folder, done = session / name, session / f"{name}.done"
    with open(session / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder
