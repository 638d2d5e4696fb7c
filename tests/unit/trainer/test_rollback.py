"""A guard that rolls back: the run goes on from its last checkpoint with later data, and its record shows one past."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rl.checkpoint.folders import latest_step
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import GuardAction, GuardConfig, ParallelConfig
from megatron_rl.engine.initialize import finalize, initialize
from megatron_rl.parallel.groups import Groups
from megatron_rl.runs.logs import read_metrics
from megatron_rl.trainer import sft, update
from megatron_rl.trainer.training import Training
from megatron_rl.trainer.update import GuardStop
from tests.e2e.test_faults import supervised_run

NUM_STEPS, BATCH = 6, 8


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield initialize(ParallelConfig(), seed=1)
    finalize()


class Trips:
    """Stands for the guards: trips at the given updates, counted from 1."""

    def __init__(self, action: GuardAction, *updates: int) -> None:
        self.action, self.updates, self.count = action, updates, 0

    def __call__(self, *_: Any) -> tuple[GuardAction, str] | None:
        self.count += 1
        return (self.action, "sft/loss is too high") if self.count in self.updates else None


def train(folder: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch, trips: Trips, *overrides: str) -> list[Any]:
    """Train with the trips; the positions in the data of the batches that were drawn."""
    run = supervised_run(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(update, "tripped", trips)
    drawn: list[Any] = []
    minibatch = Training.minibatch
    monkeypatch.setattr(Training, "minibatch", lambda self, s, i: drawn.append(list(i)) or minibatch(self, s, i))
    settings = ("parallel.data_parallel_size=1", f"train.num_steps={NUM_STEPS}", "checkpoint.export_hf=false")
    config = load_config(folder / "run.yaml", [*settings, "logging.tensorboard=false", *overrides])
    config.guards = [GuardConfig("sft/loss", above=1.0)]
    try:
        sft.train_sft(config, groups)
    finally:
        assert run.directory.metrics_file.exists()
    return drawn


def test_the_run_goes_back_and_on_with_later_data(
    tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Saved after 2 and 4 steps; the fourth update trips, so step 3, made after the checkpoint of step 2, goes too.
    drawn = train(tmp_path, groups, monkeypatch, Trips(GuardAction.rollback, 4))
    rows = read_metrics(tmp_path / "runs/run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [row.get("guards/rollbacks", 0.0) for row in rows] == [0, 0, 1, 1, 1, 1]
    assert len(drawn) == NUM_STEPS + 2
    assert len({tuple(batch) for batch in drawn}) == len(drawn)  # no batch comes twice
    assert latest_step(tmp_path / "runs/run/checkpoints") == NUM_STEPS
    assert "step 4: sft/loss is too high; back at step 2, on with later data" in capsys.readouterr().err


def test_too_many_ends_the_run_in_one_line(tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GuardStop, match=r"step 4: .* has gone back 1 times, train.max_rollbacks"):
        train(tmp_path, groups, monkeypatch, Trips(GuardAction.rollback, 3, 5), "train.max_rollbacks=1")
    assert [row["step"] for row in read_metrics(tmp_path / "runs/run/metrics.jsonl")] == [1, 2, 3]


def test_without_a_checkpoint_there_is_no_way_back(
    tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GuardStop, match=r"step 1: .* there is no checkpoint to go back to"):
        train(tmp_path, groups, monkeypatch, Trips(GuardAction.rollback, 1))


def test_skipping_and_stopping(tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "skip", groups, monkeypatch, Trips(GuardAction.skip, 2, 5))
    rows = read_metrics(tmp_path / "skip/runs/run/metrics.jsonl")
    assert [row["optim/skipped_updates"] for row in rows] == [0, 1, 0, 0, 1, 0]
    with pytest.raises(GuardStop, match="step 3: sft/loss is too high; nothing was updated"):
        train(tmp_path / "stop", groups, monkeypatch, Trips(GuardAction.stop, 3))
    assert json.loads((tmp_path / "stop/runs/run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
