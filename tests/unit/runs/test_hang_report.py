"""Who waits for whom, from what each rank said last."""

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.runs.diagnosis import RankState, hang_report, read_states, write_state

NOW = 1000.0


def state(rank: int, **changed: Any) -> RankState:
    """A rank that waits in an all_reduce since 60 s and says so every second."""
    usual: dict[str, Any] = dict(
        pid=100 + rank, host="a", time=NOW - 0.5, step=7, phase="train", phase_since=NOW - 60,
        place="all_reduce (engine/optimizer.py:9)", waits=True, place_since=NOW - 55, collectives=40,
        heartbeat_seconds=1.0, ended=None,
    )  # fmt: skip
    return RankState(rank=rank, **(usual | changed))


WAIT = "train of step 7: all_reduce (engine/optimizer.py:9)"
BUSY = dict(waits=False, phase="score", place="sleep (verifier.py:3)", phase_since=NOW - 90)


@pytest.mark.parametrize(
    ("states", "line"),
    [
        (
            [state(0), state(1, time=NOW - 20), state(2)],
            f"rank 1 is silent for 20 s (process 101 on a, last in {WAIT}): stopped, dead, or its node is gone; "
            f"ranks 0, 2 wait for it in {WAIT}",
        ),
        (
            [state(0), state(1, **BUSY)],
            f"rank 1 is in score of step 7: sleep (verifier.py:3) for 90 s; rank 0 waits for it in {WAIT}",
        ),
        (
            [state(0), state(1, place="broadcast (weights/files/gather.py:5)", collectives=39), state(2)],
            "rank 1 is in another collective, train of step 7: broadcast (weights/files/gather.py:5); "
            f"ranks 0, 2 wait for it in {WAIT}",
        ),
        (
            [state(0), state(1, host="b")],
            f"all ranks wait in {WAIT}, and none is missing: suspect the network between a, b",
        ),
        ([state(0, **BUSY)], "rank 0 is in score of step 7: sleep (verifier.py:3) for 90 s, over its limit"),
        ([state(0, ended="done"), state(1, ended="RuntimeError: x")], "no rank is running"),
        # One that has ended is waited for by nobody's fault but its own; the rest is judged.
        ([state(0), state(1, **BUSY), state(2, ended="ValueError: x", time=NOW - 500)], None),
    ],
)
def test_the_line(states: list[RankState], line: str | None) -> None:
    if line is None:
        assert hang_report(states, now=NOW).startswith("rank 1 is in score")
    else:
        assert hang_report(states, now=NOW) == line


def test_many_ranks_are_counted() -> None:
    states = [state(rank) for rank in range(511)] + [state(511, time=NOW - 20)]
    assert hang_report(states, now=NOW).endswith(f"; ranks 0, 1, 2, ... (511) wait for it in {WAIT}")


def test_states_are_read_back_and_damaged_ones_left_out(tmp_path: Path) -> None:
    for rank in (1, 0, 10):
        write_state(tmp_path, state(rank))
    (tmp_path / "rank_2.json").write_text('{"rank": 2')
    assert read_states(tmp_path) == [state(0), state(1), state(10)]
