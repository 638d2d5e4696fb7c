"""Process groups of up to 1,024 ranks, as one rank of them makes them, on torch's fake process group."""

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_rl import device
from megatron.core import parallel_state

world, tp, pp = map(int, sys.argv[1:])
new_group = dist.new_group
dist.new_group = lambda *args, **given: new_group(*args, **(given | {"backend": "fake"}))  # core asks for gloo by name
torch.distributed.new_group = dist.new_group
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
groups = [tuple(sorted(ranks)) for ranks in dist.distributed_c10d._world.pg_group_ranks.values()]
larger = [ranks for ranks in groups if len(ranks) > 1]
print(json.dumps({
    "groups": len(larger),
    "communicators": len(set(larger)),
    "mesh": sum(len(ranks) - 1 for ranks in larger),
    "peers": len({rank for ranks in larger for rank in ranks}) - 1,
}))
"""
_MOST_GROUPS = 24
"""That core makes and rank 0 is in; a group costs memory and start-up time, whatever it is used for."""


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline"),
    [(8, 1, 1), (8, 4, 1), (64, 4, 1), (512, 4, 1), (512, 8, 4), pytest.param(1024, 8, 4, marks=pytest.mark.slow)],
)
def test_finding_8_groups_and_sockets_of_a_rank(world: int, tensor: int, pipeline: int) -> None:
    command = [sys.executable, "-c", _PROGRAM, *map(str, (world, tensor, pipeline))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    print(world, tensor, pipeline, found)
    assert found["groups"] <= _MOST_GROUPS
    # NCCL has a communicator per group that is used; sets of ranks that differ are what could need one.
    assert found["communicators"] <= 8
    assert found["peers"] == world - 1
    # With TORCH_GLOO_LAZY_INIT=1 (see `engine.initialize`) these are not opened; without it they would be, all at once.
    assert found["mesh"] >= world - 1
