"""A run does not go on with another model: each field that differs is named."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rl.checkpoint.folders import CheckpointError
from megatron_rl.config.errors import UserError
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.engine.initialize import finalize, initialize
from megatron_rl.parallel.groups import Groups
from megatron_rl.trainer import sft
from tests import checkpoints
from tests.e2e.test_faults import supervised_run

SETTINGS = ("parallel.data_parallel_size=1", "checkpoint.export_hf=false", "logging.tensorboard=false")


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield initialize(ParallelConfig(), seed=1)
    finalize()


def test_another_model_or_recipe_is_refused_by_the_field_and_other_data_is_said(
    tmp_path: Path, groups: Groups, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    supervised_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")

    def train(*overrides: str) -> None:
        sft.train_sft(load_config(tmp_path / "run.yaml", [*SETTINGS, *overrides]), groups)

    train("train.num_steps=2")
    for field, size in (("vocab_size", 320), ("num_hidden_layers", 3), ("intermediate_size", 96)):
        other = checkpoints.make_checkpoint(tmp_path / field, "qwen2", 1, **{field: size})
        with pytest.raises(CheckpointError, match=r"of the policy is .*, this run's is") as raised:
            train("train.num_steps=3", f"model.hf_path={other}")
        assert "Traceback" not in str(raised.value)
    with pytest.raises(UserError, match=r"^recipe: given 'rl'"):
        train("train.num_steps=3", "recipe=rl")
    rows = Path(load_config(tmp_path / "run.yaml", []).data.train or "")
    (tmp_path / "two.jsonl").write_text("".join(reversed((tmp_path / rows).read_text().splitlines(keepends=True))))
    capsys.readouterr()
    train("train.num_steps=3", "data.train=two.jsonl")
    said = "".join(capsys.readouterr())
    assert "data.train was" in said
    assert "two.jsonl: other data than before; the run keeps its place" in said
