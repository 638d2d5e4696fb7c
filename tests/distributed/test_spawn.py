"""The harness of the distributed tests must itself fail where it should."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.spawn import RankFailed, run_ranks


def sum_of_ranks(rank: int, offset: float) -> tuple[float, int]:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return float(value), torch.get_num_threads()


def fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise KeyError("planted")
    dist.barrier()


def hang_on_rank_0(rank: int) -> None:
    if rank == 0:
        time.sleep(600)


def test_results_come_in_rank_order_from_one_world():
    # 0 + 1 + 2 ranks, and three times the offset 0.5: 4.5
    assert run_ranks(sum_of_ranks, 3, 0.5) == [(4.5, 1)] * 3


def of_the_server(rank: int) -> tuple[int, bool, str]:
    # Megatron-Core is there before anything was asked for; what the test's process has set is seen.
    return len(os.listdir(f"/proc/{os.getppid()}/task")), "megatron.core" in sys.modules, os.environ["OF_THE_TEST"]


def test_ranks_are_forked_from_a_server_with_one_thread(monkeypatch):
    monkeypatch.setenv("OF_THE_TEST", "seen")
    assert run_ranks(of_the_server, 2) == [(1, True, "seen")] * 2


def test_first_failing_rank_is_named_and_others_do_not_wait():
    with pytest.raises(RankFailed, match=r"(?s)^first failed rank 1 of 2.*KeyError: 'planted'"):
        run_ranks(fail_on_rank_1, 2)


def test_hanging_rank_is_stopped_and_says_where_it_stood():
    with pytest.raises(RankFailed, match="hang_on_rank_0"):
        run_ranks(hang_on_rank_0, 2, timeout_s=3)
