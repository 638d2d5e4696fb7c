"""A plan carried out in a process group that is made beside every world; its ranks are threads here.

The same plan as in `test_exchange.py`: rank 0 sends, ranks 1 and 2 receive.
"""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.transport.exchange import Exchange, verified
from megatron_rl.weights.transport.messages import TransferError
from megatron_rl.weights.transport.process_group import ProcessGroupTransport, join
from tests.unit.weights.transport.test_exchange import Memory, parameters, plan

HOST = "127.0.0.1"
CPU = torch.device("cpu")


@pytest.fixture
def port() -> Iterator[int]:
    """Of a store."""
    listener = socket.create_server((HOST, 0))
    number = int(listener.getsockname()[1])
    store = dist.TCPStore(HOST, number, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    yield number
    del store


def joined(port: int, rank: int, *, name: str = "group", size: int = 3, seconds: float = 20) -> ProcessGroupTransport:
    timeout = timedelta(seconds=seconds)
    group = join(HOST, port, name, rank=rank, size=size, timeout=timeout, device=CPU)
    return ProcessGroupTransport(group, timeout=timeout)


def test_two_versions_arrive_in_one_group(port: int) -> None:
    whole, held = plan(), parameters()
    rank_plans = {rank: RankPlan.of(whole, rank, {}) for rank in range(3)}
    memories = {rank: Memory(rank_plans[rank]) for rank in (1, 2)}

    def run(rank: int) -> None:
        transport, exchange = joined(port, rank), Exchange(rank_plans[rank])
        for version in (1, 2):
            check = verified("full", version)
            sent = {} if rank else {name: version * tensor for name, tensor in held.items()}
            exchange.run(sent, memories.get(rank), transport, version=version, verify=check)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    embedding = torch.zeros(128, 6)
    embedding[:70] = 2 * held["embedding.word_embeddings.weight"]
    for t, rank in enumerate((1, 2)):
        assert torch.equal(memories[rank].tensors["model.embed_tokens.weight"], embedding[64 * t : 64 * (t + 1)])


def test_a_rank_that_does_not_come_is_not_waited_for_longer(port: int) -> None:
    begun = time.monotonic()
    with pytest.raises(TransferError, match="rank 0: not all 2 ranks have met within 1 s"):
        joined(port, 0, size=2, seconds=1)
    assert time.monotonic() - begun < 20


def test_another_name_is_another_group(port: int) -> None:
    """Who does not know the token in the name meets nobody."""
    with ThreadPoolExecutor(2) as pool:
        names = pool.map(lambda rank: joined(port, rank, name=f"token {rank}", size=2, seconds=1), range(2))
        with pytest.raises(TransferError, match="not all 2 ranks have met"):
            list(names)


def test_a_peer_that_sends_nothing_is_named(port: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda rank: joined(port, rank, size=2, seconds=2), range(2)))
        with pytest.raises(TransferError, match="weights from rank 0, bucket 4: not done within 2 s"):
            ends[1].post(4, {}, {0: 64}).arrived(0)
