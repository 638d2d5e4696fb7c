"""A reference policy that moves comes back from a checkpoint bit for bit, in float32 where it is an average."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_rl.checkpoint import training_state
from megatron_rl.checkpoint.folders import iteration_folder
from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
from megatron_rl.engine.initialize import finalize, initialize
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.reference import ReferenceWeights
from megatron_rl.parallel.groups import Groups
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield initialize(ParallelConfig(), seed=1)
    finalize()


@pytest.mark.parametrize(("is_average", "decay"), [(True, 0.75), (False, 0.0)])
def test_it_comes_back(groups: Groups, is_average: bool, decay: float, tmp_path: Path) -> None:
    hf_path = str(make_checkpoint(tmp_path / "hf", "qwen3", seed=3))

    def start() -> ReferenceWeights:
        policy = Policy(ModelConfig(hf_path=hf_path, params_dtype=Dtype.bfloat16), groups, ParallelConfig())
        return ReferenceWeights(policy, is_average=is_average)

    reference = start()
    with torch.no_grad():
        for parameter in reference.parameters().values():
            parameter.mul_(1.5)
    reference.move(decay)
    folder = iteration_folder(tmp_path, 7)
    folder.mkdir()
    dist_checkpointing.save(training_state.reference_to_save(reference), str(folder))
    fresh = start()
    assert any(not torch.equal(fresh.weights[name], reference.weights[name]) for name in fresh.weights)
    training_state.load_reference(tmp_path, 7, fresh)
    for name, weight in fresh.weights.items():
        assert torch.equal(weight, reference.weights[name]), name
        assert weight.dtype is (torch.float32 if is_average else torch.bfloat16)
