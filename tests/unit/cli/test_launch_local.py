"""The launcher with real processes: a small script stands in for the rank.

Each test starts a launcher as a process of its own, since it is about what is left when that process ends.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rl.cli.launch_local import launch

LAUNCHER = """
import sys
from pathlib import Path
from megatron_rl.cli import launch_local
launch_local.GRACE_SECONDS = 1.0
sys.exit(launch_local.launch([sys.executable, "-c", sys.argv[1]], num_ranks=int(sys.argv[2]), logs=Path("logs")))
"""
# Every rank notes its process id, and that of a child which would outlive it.
PRELUDE = """
import os, pathlib, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
child = subprocess.Popen(["sleep", "60"])
pathlib.Path(f"pids_{rank}.partial").write_text(f"{os.getpid()} {child.pid}")
os.rename(f"pids_{rank}.partial", f"pids_{rank}")
while len(list(pathlib.Path().glob("pids_?"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
"""
WAIT_S = 20.0  # many times what a step takes on a busy machine


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, int], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start_launcher(body: str, num_ranks: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, PRELUDE + body, str(num_ranks)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_launcher
    for process in started:
        process.kill()
        process.communicate()


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(folder: Path, num_ranks: int) -> list[int]:
    """Of all ranks and their children, once all have started."""
    files = [folder / f"pids_{rank}" for rank in range(num_ranks)]
    until(lambda: all(file.exists() for file in files))
    return [int(pid) for file in files for pid in file.read_text().split()]


def test_every_rank_finds_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MASTER_PORT")
    script = f"import os; open('rank_' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert launch([sys.executable, "-c", script], num_ranks=3, logs=tmp_path / "logs") == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    seen = [Path(f"rank_{rank}").read_text().split() for rank in range(3)]
    assert [place[:-1] for place in seen] == [f"{rank} {rank} 3 127.0.0.1 {threads}".split() for rank in range(3)]
    assert len({place[-1] for place in seen}) == 1


def test_rank_0_has_the_terminal_and_the_others_logs_that_are_kept(tmp_path: Path, start: Callable) -> None:
    for _ in range(2):
        for file in tmp_path.glob("pids_*"):
            file.unlink()
        process = start("print('out', rank); print('err', rank, file=sys.stderr)", 2)
        assert process.communicate(timeout=WAIT_S) == ("out 0\n", "err 0\n")
        assert process.returncode == 0
    lines = (tmp_path / "logs/rank_1.log").read_text().splitlines()
    assert sorted(lines) == ["err 1", "err 1", "out 1", "out 1"]
    assert not any(alive(pid) for pid in pids(tmp_path, 2))  # the children too, though all ended well


def test_one_rank_fails_and_all_end(tmp_path: Path, start: Callable) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_1.log").write_text("Traceback (most recent call last):\nan error of an earlier run\n")
    process = start("if rank == 1:\n    raise RuntimeError('lost')\ntime.sleep(60)", 3)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "rank 1 failed first, with exit code 1; the end of logs/rank_1.log:\nTraceback" in errors
    assert errors.endswith("RuntimeError: lost\n")
    assert "earlier run" not in errors
    assert not any(alive(pid) for pid in pids(tmp_path, 3))


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path, start: Callable) -> None:
    body = "if rank == 1:\n    sys.exit(7)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    process = start(body, 2)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 7
    assert errors.startswith("megatron-rl: rank 1 failed first, with exit code 7")
    assert not any(alive(pid) for pid in pids(tmp_path, 2))


def test_a_users_mistake_is_one_line(start: Callable) -> None:
    process = start(
        "print('noise\\nmegatron-rl: error: x', file=sys.stderr) if rank else time.sleep(60)\nsys.exit(2)", 2
    )
    assert process.communicate(timeout=WAIT_S)[1] == "megatron-rl: error: x\n"
    assert process.returncode == 2


def test_a_rank_killed_by_a_signal_is_named(start: Callable) -> None:
    process = start("os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)", 2)
    assert process.communicate(timeout=WAIT_S)[1] == "megatron-rl: rank 0 was ended by SIGKILL\n"
    assert process.returncode == 128 + 9


def test_a_signal_is_passed_on_and_the_ranks_decide(tmp_path: Path, start: Callable) -> None:
    body = """
def save(number, frame):
    time.sleep(0.2)
    pathlib.Path(f"saved_{rank}").write_text(signal.Signals(number).name)
    sys.exit(0)
signal.signal(signal.SIGINT, save)
pathlib.Path(f"ready_{rank}").touch()
time.sleep(60)
"""
    process = start(body, 2)
    until(lambda: len(list(tmp_path.glob("ready_?"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=WAIT_S) == ("", "")
    assert process.returncode == 0
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in range(2)] == ["SIGINT", "SIGINT"]
    assert not any(alive(pid) for pid in pids(tmp_path, 2))


def test_ranks_that_a_signal_ends_are_no_error(tmp_path: Path, start: Callable) -> None:
    process = start("time.sleep(60)", 2)
    waiting = pids(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=WAIT_S) == ("", "")
    assert process.returncode == 128 + 15
    assert not any(alive(pid) for pid in waiting)


def test_a_second_signal_ends_ranks_that_do_not_listen(tmp_path: Path, start: Callable) -> None:
    body = "signal.signal(signal.SIGINT, signal.SIG_IGN)\npathlib.Path(f'ready_{rank}').touch()\ntime.sleep(60)"
    process = start(body, 2)
    until(lambda: len(list(tmp_path.glob("ready_?"))) == 2)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)  # the ranks are given their time
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + 2
    assert not any(alive(pid) for pid in pids(tmp_path, 2))


def test_a_killed_launcher_leaves_nothing_behind(tmp_path: Path, start: Callable) -> None:
    process = start("time.sleep(60)", 2)
    started = pids(tmp_path, 2)
    assert len(started) == 4
    assert all(alive(pid) for pid in started)
    process.kill()
    until(lambda: not any(alive(pid) for pid in started))
