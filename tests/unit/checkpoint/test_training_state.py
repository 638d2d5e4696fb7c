"""Saving and restoring a run's state on one rank: what comes back is bit for bit what was saved."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_rl.checkpoint import training_state
from megatron_rl.checkpoint.folders import LATEST, CheckpointError, iteration_folder, latest_step
from megatron_rl.checkpoint.training_state import POLICY, Trained
from megatron_rl.checkpoint.writer import CheckpointWriter
from megatron_rl.config.schema import Dtype, LRDecayStyle, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.data.packing import MicroBatch, pack
from megatron_rl.engine.initialize import finalize, initialize
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.step import forward_backward
from megatron_rl.parallel.groups import Groups
from tests.checkpoints import make_checkpoint
from tests.distributed.training_ranks import recorded_rollouts

RUN_STATE = {"step": 3, "data_position": 40}


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield initialize(ParallelConfig(), seed=1)
    finalize()


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3", seed=3)


class Run:
    """A policy with its optimizer, trained on the recorded rollouts; `fresh` starts from random weights."""

    def __init__(
        self,
        hf_path: Path,
        groups: Groups,
        dtype: Dtype,
        distributed: bool,
        *,
        fresh: bool = False,
        lr: float = 1e-2,
        num_steps: int = 10,
    ) -> None:
        model = ModelConfig(hf_path=str(hf_path), params_dtype=dtype, load_weights=not fresh)
        self.policy = Policy(model, groups, ParallelConfig(), use_distributed_optimizer=distributed)
        settings = OptimizerConfig(
            lr=lr,
            lr_decay_style=LRDecayStyle.linear,
            lr_warmup_steps=2,
            weight_decay=0.1,
            use_distributed_optimizer=distributed,
        )
        self.optimizer = Optimizer(settings, self.policy, num_steps=num_steps)

    def train(self, steps: range) -> list[tuple[float, float]]:
        """(gradient norm, learning rate) of each step; a step's data are a function of its number."""
        updates = []
        sequences = recorded_rollouts()
        for step in steps:
            micro_batch = pack(sequences, [step, step + 4], pad_to_multiple=1)
            self.optimizer.zero_grad()
            forward_backward(self.policy, [micro_batch], mean_nll)
            update = self.optimizer.step()
            assert update.finite
            updates.append((update.grad_norm, update.lr))
        return updates

    def save(self, folder: Path, step: int, run_state: dict[str, Any], *, keep_last: int | None = None) -> None:
        writer = CheckpointWriter(folder, asynchronous=False, keep_last=keep_last)
        writer.save(step, training_state.to_save({POLICY: Trained(self.policy, self.optimizer)}, run_state))

    def load(self, folder: Path, step: int) -> dict[str, Any]:
        return training_state.load(folder, step, {POLICY: Trained(self.policy, self.optimizer)})

    def state(self) -> dict[str, Tensor]:
        """Everything that a step reads: parameters, the optimizer's float32 copies, moments and step counts."""
        tensors = dict(self.policy.models[0].named_parameters())
        (inner,) = (one.optimizer for one in self.optimizer.megatron.chained_optimizers)
        flat = [parameter for group in inner.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(flat):
            tensors[f"{index}.main"] = parameter
            tensors |= {f"{index}.{name}": value for name, value in inner.state[parameter].items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def mean_nll(log_probs: Tensor, entropy: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Any]]:
    return -(log_probs * micro_batch.loss_mask).sum() / micro_batch.loss_mask.sum(), {}


def assert_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def random_numbers() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "replicated"])
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16], ids=["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, hf_path: Path, groups: Groups, dtype: Dtype, distributed: bool
) -> None:
    run = Run(hf_path, groups, dtype, distributed)
    run.train(range(3))
    run.save(tmp_path, 3, RUN_STATE)
    saved, numbers = run.state(), random_numbers()
    # Embedding, final norm and 8 parameters of each of 2 layers; of each also the copy, two moments and the count.
    assert len(saved) == (2 + 2 * 8) * 5
    assert {float(saved[name]) for name in saved if name.endswith(".step")} == {3.0}
    updates, final = run.train(range(3, 6)), run.state()

    resumed = Run(hf_path, groups, dtype, distributed, fresh=True)
    random_numbers()
    assert resumed.load(tmp_path, 3) == RUN_STATE
    assert_identical(resumed.state(), saved)
    assert random_numbers() == numbers
    assert resumed.train(range(3, 6)) == updates
    assert_identical(resumed.state(), final)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "replicated"])
def test_a_run_without_an_update_is_saved_too(tmp_path: Path, hf_path: Path, groups: Groups, distributed: bool) -> None:
    """Where all updates were skipped as not finite, torch's AdamW has no state, which core takes for granted."""
    run = Run(hf_path, groups, Dtype.float32, distributed)
    run.save(tmp_path, 1, {})
    resumed = Run(hf_path, groups, Dtype.float32, distributed, fresh=True)
    resumed.load(tmp_path, 1)
    assert resumed.train(range(2)) == Run(hf_path, groups, Dtype.float32, distributed).train(range(2))


@pytest.fixture(scope="module")
def run(hf_path: Path, groups: Groups) -> Run:
    return Run(hf_path, groups, Dtype.float32, True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run.save(folder, 7, RUN_STATE)
    return folder


@pytest.fixture
def copied(tmp_path: Path, saved: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def change_common(folder: Path, **fields: Any) -> None:
    """Written as core 0.16 to 0.18 store it; 0.19 reads it too, before its own form."""
    iteration = iteration_folder(folder, 7)
    common = dist_checkpointing.load_common_state_dict(str(iteration))
    torch.save({**common, **fields}, iteration / "common.pt")


def test_old_checkpoints_are_deleted_and_half_written_ones_ignored(tmp_path: Path, run: Run) -> None:
    partial = tmp_path / ".iter_0000002.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    for step in (1, 2, 10):
        run.save(tmp_path, step, {}, keep_last=2)
        assert latest_step(tmp_path) == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", "iter_0000010", LATEST]
    assert not (tmp_path / "iter_0000002" / "half").exists()
    partial.mkdir()
    assert latest_step(tmp_path) == 10


def test_a_save_that_fails_leaves_the_latest_checkpoint(copied: Path, run: Run) -> None:
    with pytest.raises(Exception, match="local object"):  # a function cannot be pickled
        run.save(copied, 8, {"x": lambda: 0}, keep_last=1)
    assert latest_step(copied) == 7
    assert run.load(copied, 7) == RUN_STATE


def test_latest_step(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    (tmp_path / LATEST).write_text("ten\n")
    with pytest.raises(CheckpointError, match=f"{LATEST}: expected a step number, got 'ten'"):
        latest_step(tmp_path)
    (tmp_path / LATEST).write_text("12\n")
    with pytest.raises(CheckpointError, match=r"names step 12, but .*iter_0000012 is missing"):
        latest_step(tmp_path)


def test_a_truncated_file_is_named_and_nothing_is_changed(copied: Path, run: Run) -> None:
    *_, last = sorted(iteration_folder(copied, 7).glob("*.distcp"))
    last.write_bytes(last.read_bytes()[:-1])
    before = run.state()
    with pytest.raises(CheckpointError, match=f"iter_0000007/{last.name} is truncated"):
        run.load(copied, 7)
    assert_identical(run.state(), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("common.pt", r"iter_0000007/common\.pt is truncated or damaged"),
        ("__0_0.distcp", "iter_0000007 cannot be read"),
    ],
)
def test_a_file_of_the_right_size_with_wrong_content(copied: Path, run: Run, name: str, message: str) -> None:
    change_common(copied)
    file = iteration_folder(copied, 7) / name
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=message):
        run.load(copied, 7)


def test_a_converted_model_is_no_training_state(copied: Path, run: Run) -> None:
    change_common(copied, layout=None)
    with pytest.raises(CheckpointError, match="holds a model without training state"):
        run.load(copied, 7)


def test_a_changed_schedule_is_followed_after_a_resume(tmp_path: Path, hf_path: Path, groups: Groups) -> None:
    run = Run(hf_path, groups, Dtype.float32, True)
    run.train(range(3))
    run.save(tmp_path, 3, RUN_STATE)
    resumed = Run(hf_path, groups, Dtype.float32, True, lr=4e-3, num_steps=22)
    resumed.load(tmp_path, 3)
    ((_, lr),) = resumed.train(range(3, 4))
    # Linear decay to 0 over steps 2 to 22, and 3 steps were made: 4e-3 * (22 - 3) / 20.
    assert lr == pytest.approx(3.8e-3, rel=1e-12)
