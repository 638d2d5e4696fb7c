"""Tests that need a GPU; without one each is skipped by name. `tools/gpu_qualify.sh` runs them.

They share one world of one rank, joined over NCCL, as a run on one GPU has it.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rl.models.capabilities import has_transformer_engine
from tests.checkpoints import make_checkpoint

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        # The head's Triton kernels also run in Triton's interpreter.
        if HERE in item.path.parents and not (INTERPRETED and item.path.name == "test_log_prob_head.py"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def needs(module: str) -> pytest.MarkDecorator:
    """Skip, with the name, where a package is absent."""
    found = has_transformer_engine() if module == "transformer_engine" else importlib.util.find_spec(module)
    return pytest.mark.skipif(not found, reason=f"needs {module}")


@pytest.fixture(scope="session")
def groups() -> Iterator[object]:
    import torch.distributed as dist

    from megatron_rl.config.schema import ParallelConfig
    from megatron_rl.device import distributed_backend
    from megatron_rl.engine.initialize import finalize, initialize

    dist.init_process_group(distributed_backend(), store=dist.HashStore(), rank=0, world_size=1)
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 whose sides FP8 and flash attention take."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return make_checkpoint(tmp_path_factory.mktemp("gpu"), "qwen3_untied", 1, **sizes)
