import io
import os
import pty
import select
import termios

import pytest

from megatron_rl.runs.progress import Progress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(total, seconds_per_unit, **arguments) -> list[str]:
    file, clock = io.StringIO(), Clock()
    initial = arguments.get("initial", 0)
    with Progress(total, "train", True, file=file, clock=clock, **arguments) as progress:
        for _ in range(initial, total):
            clock.now += seconds_per_unit
            progress.update()
    assert "\r" not in file.getvalue()
    return file.getvalue().splitlines()


def test_a_line_says_how_far_how_long_and_the_numbers():
    file, clock = io.StringIO(), Clock()
    progress = Progress(200, "train", True, initial=50, file=file, clock=clock)
    clock.now += 90.0
    progress.update(30, reward=0.512345, loss=-0.02)
    # 30 units in 90 s; 200 - 80 = 120 are left, at 3 s each: 360 s. The 50 before the resume took no time here.
    assert file.getvalue() == "train 80/200 (40%)   01:30 elapsed, 06:00 left   reward 0.5123, loss -0.02\n"


def test_slow_units_have_a_line_each():
    assert [line.split()[1] for line in lines_of(3, 60.0)] == ["1/3", "2/3", "3/3"]


def test_fast_units_have_a_line_each_tenth_and_never_two_within_a_second():
    # 1,000 units of 0.02 s: a tenth takes 2 s, so lines come at the first unit, then at each tenth.
    done = [int(line.split()[1].split("/")[0]) for line in lines_of(1000, 0.02)]
    assert done == [1, *range(100, 1001, 100)]
    # A tenth takes 0.1 s: the first line at 0.001 s, the next tenth after a second is the last one.
    done = [int(line.split()[1].split("/")[0]) for line in lines_of(1000, 0.001)]
    assert done == [1, 1000]


def test_a_long_run_has_a_line_each_ten_seconds_or_tenth():
    # 100,000 units of 0.01 s, 1,000 s: about a hundred lines by time and at most ten more by tenths.
    assert 100 <= len(lines_of(100_000, 0.01)) <= 111


def test_a_resumed_run_starts_where_it_was():
    done = [line.split()[1] for line in lines_of(10, 60.0, initial=8)]
    assert done == ["9/10", "10/10"]


def test_work_inside_a_step_is_told_only_when_it_is_slow():
    file, clock = io.StringIO(), Clock()
    progress = Progress(5, "train", True, file=file, clock=clock)
    with progress.nested(64, "generate") as quick:
        for _ in range(64):
            clock.now += 0.1
            quick.update()
    assert file.getvalue() == ""
    with progress.nested(64, "generate") as slow:
        for _ in range(64):
            clock.now += 0.5
            slow.update()
    # 32 s in all: after 10, 20 and 30 s, which are 20, 40 and 60 completions.
    assert [line.split()[:2] for line in file.getvalue().splitlines()] == [
        ["generate", "20/64"],
        ["generate", "40/64"],
        ["generate", "60/64"],
    ]


def test_switched_off_it_is_silent():
    file = io.StringIO()
    with Progress(10_000, "train", False, file=file) as progress, progress.nested(5, "generate") as inner:
        progress.write("a line")
        for _ in range(3):
            inner.update(1, x=1.0)
            progress.update(1, reward=1.0)
    assert file.getvalue() == ""


def test_lines_can_be_printed_between():
    file = io.StringIO()
    Progress(5, "train", True, file=file).write("resumed from step 3")
    assert file.getvalue() == "resumed from step 3\n"


def shown(reader: int) -> str:
    """What has been written to the terminal; the kernel hands it on a little later than it was written."""
    text = b""
    while select.select([reader], [], [], 0.5)[0]:
        text += os.read(reader, 1 << 16)
    return text.decode()


@pytest.fixture
def terminal():
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as file:
        yield reader, file
    os.close(reader)


def test_on_a_terminal_it_is_a_bar_and_the_inner_one_vanishes(terminal):
    reader, file = terminal
    termios.tcsetwinsize(file, (24, 100))
    with Progress(4, "train", True, initial=2, file=file) as progress:
        with progress.nested(8, "generate") as inner:
            inner.update(8)
        file.flush()
        text = shown(reader)
        assert "generate" in text
        # The speed ends the bar's line; what comes after it overwrites the line with spaces.
        assert " " * 40 in text.rpartition("it/s]")[2]
        progress.update(1, reward=0.25, loss=1.0)
        progress.update(1, reward=0.75)
    file.flush()
    text = shown(reader)
    last = text.rstrip().splitlines()[-1].split("\r")[-1]
    assert "train: 100%" in last
    assert "4/4" in last
    assert "reward 0.75, loss 1" in last, "numbers that are not given again stay"
    assert "generate" not in last


def test_a_terminal_of_unknown_width_gets_plain_lines(terminal):
    reader, file = terminal
    termios.tcsetwinsize(file, (0, 0))
    with Progress(1, "train", True, file=file) as progress:
        progress.update()
    assert shown(reader).startswith("train 1/1 (100%)")
