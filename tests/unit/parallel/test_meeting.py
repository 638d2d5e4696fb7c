"""Ranks that wait outside collectives: as long as somebody works, and no longer; clients of a real store."""

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from megatron_rl.parallel.meeting import Meeting, NoProgressError

SIZE = 3
LIMIT = 1.0


@pytest.fixture
def stores() -> list[dist.TCPStore]:
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [first, *(dist.TCPStore("127.0.0.1", first.port, wait_for_workers=False) for _ in range(SIZE - 1))]


def run(stores: list[dist.TCPStore], body: Callable[[Meeting, int], None], seen: list[int] | None = None) -> list[str]:
    """Run `body` in each rank; what each raised, '' for nothing."""
    ended = [""] * SIZE

    def of_rank(rank: int) -> None:
        meeting = Meeting(
            stores[rank],
            rank,
            SIZE,
            name="test",
            limit_seconds=LIMIT,
            poll_seconds=0.1,
            on_progress=lambda: None if seen is None else seen.append(rank),
        )
        try:
            body(meeting, rank)
        except NoProgressError as error:
            ended[rank] = str(error)

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return ended


def test_nobody_leaves_before_all_have_come(stores: list[dist.TCPStore]) -> None:
    came: list[tuple[int, int]] = []

    def body(meeting: Meeting, rank: int) -> None:
        for number in range(20):
            if (rank + number) % SIZE == 0:
                time.sleep(0.01)
            came.append((number, rank))
            meeting.wait("generate")
            assert {r for n, r in came if n == number} == set(range(SIZE))

    assert run(stores, body) == [""] * SIZE


def test_keys_of_past_meetings_are_removed(stores: list[dist.TCPStore]) -> None:
    def body(meeting: Meeting, rank: int) -> None:
        for _ in range(10):
            meeting.wait("generate")

    run(stores, body)
    assert stores[0].num_keys() <= SIZE + 4  # the last meeting's, the progress, and one of the store's own


def test_a_wait_five_times_the_limit_passes_if_somebody_works(stores: list[dist.TCPStore]) -> None:
    seen: list[int] = []

    def body(meeting: Meeting, rank: int) -> None:
        end = time.monotonic() + 5 * LIMIT
        while rank == 2 and time.monotonic() < end:
            time.sleep(0.05)
            meeting.progressed()
        meeting.wait("generate")

    assert run(stores, body, seen) == [""] * SIZE
    assert {0, 1, 2} == set(seen)


def test_a_silent_rank_is_named(stores: list[dist.TCPStore]) -> None:
    def body(meeting: Meeting, rank: int) -> None:
        if rank != 1:
            meeting.wait("weights of version 7")

    first, silent, last = run(stores, body)
    assert silent == ""
    assert first.startswith("weights of version 7: no rank has made progress for ")
    assert first.endswith("; waited for rank 1")
    assert last.endswith("; waited for rank 1")
