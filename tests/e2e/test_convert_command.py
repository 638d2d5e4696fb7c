"""`megatron-rl convert` as a user runs it: on a terminal, killed in the midst, and with a checkpoint that is none."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint

COMMAND = (sys.executable, "-m", "megatron_rl", "convert")
START_UP_S = 240.0
"""Against a hang alone: torch and Megatron are imported in it."""


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def to_megatron(root: Path, output: str) -> list[str]:
    return [*COMMAND, "hf-to-megatron", "--hf-path", str(root / "hf"), "--output", str(root / output)]


def to_hf(root: Path, output: str) -> list[str]:
    paths = ("--checkpoint", str(root / "megatron"), "--hf-path", str(root / "hf"))
    return [*COMMAND, "megatron-to-hf", *paths, "--output", str(root / output)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "hf", "qwen3_untied", seed=1, num_hidden_layers=4)
    return tmp_path


def on_a_terminal(command: list[str]) -> str:
    """What it prints on a terminal; it has to succeed."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 120))  # a new one has no columns, and then a bar has no room
    shown = bytearray()
    with subprocess.Popen(command, stdout=its, stderr=its, stdin=its, close_fds=True) as process:
        os.close(its)
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # it has ended
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.mark.slow
def test_there_and_back_on_a_terminal(root: Path) -> None:
    for command, doing in (
        (to_megatron(root, "megatron"), "reading the Hugging Face files"),
        (to_hf(root, "back"), "writing the Hugging Face files"),
    ):
        shown = on_a_terminal([*command, "--verify"])
        # 'doing: 100%|###| 2.5M/2.5M [00:00<00:00, 80.1MB/s]': bytes gone through, time gone < time left, speed
        assert re.search(rf"{doing}: 100%\|[^|]*\| [\d.]+\w?/[\d.]+\w? \[\d\d:\d\d<\d\d:\d\d, *[\d.]+\w?B/s\]", shown)
        (difference,) = re.findall(
            r"largest difference between transformers and Megatron: (\S+) \(log-probs: nats\)", shown
        )
        assert float(difference) < 1e-4  # float32; a tensor in the wrong place makes more than 0.1
    assert files(root / "back") == files(root / "hf")


@pytest.mark.slow
def test_killed_in_the_midst_it_leaves_no_half_checkpoint(root: Path) -> None:
    for start in (to_megatron, to_hf):
        if start is to_hf:
            assert subprocess.run(to_megatron(root, "megatron"), timeout=START_UP_S, check=False).returncode == 0
        kill_in_the_midst(start, root)
        assert not (root / "out").exists()
        assert subprocess.run(start(root, "out"), timeout=START_UP_S, check=False).returncode == 0
        if start is to_hf:
            assert files(root / "out") == files(root / "hf")
        else:
            assert (root / "out" / "latest_checkpointed_iteration.txt").read_text() == "0\n"
            (root / "out").rename(root / "complete")
        assert not list(root.glob(".*"))  # what the killed one left is gone


def kill_in_the_midst(start: Callable[[Path, str], list[str]], root: Path) -> None:
    """SIGKILL as soon as it has begun to write."""
    process = subprocess.Popen(start(root, "out"), stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + START_UP_S
    while not list(root.glob(".out.partial")):
        assert process.poll() is None, "it ended before it wrote"
        assert time.monotonic() < end, "it did not begin to write"
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_mistake_is_one_line(root: Path) -> None:
    file = root / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    ended = subprocess.run(to_megatron(root, "out"), capture_output=True, text=True, timeout=START_UP_S, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"megatron-rl: error: --hf-path: {file} is truncated: ")
    assert ended.stderr.count("\n") == 1
    assert sorted(path.name for path in root.iterdir()) == ["hf"]
