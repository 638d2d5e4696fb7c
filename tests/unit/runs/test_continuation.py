"""Which changes of a configuration make it another run, and which are said."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.checkpoint.folders import LATEST, iteration_folder
from megatron_rl.config.errors import UserError
from megatron_rl.config.load import load_config, plain_values, save_config
from megatron_rl.config.schema import Config, DataConfig
from megatron_rl.runs.continuation import _IDENTITY, _SAID, _flat, changes, file_identity
from megatron_rl.runs.directory import RunDirectory

DEFAULTS = {"name": "run", "recipe": "rl", "model": {"hf_path": "m"}, "data": {"train": "a.jsonl"}}


def _config(folder: Path, *overrides: str) -> Config:
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(DEFAULTS | {"rewards": {"functions": [{"name": "numeric_answer"}]}}))
    return load_config(file, list(overrides))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    iteration_folder(directory.checkpoints_dir, 3).mkdir(parents=True)
    (directory.checkpoints_dir / LATEST).write_text("3")
    save_config(_config(tmp_path), directory.config_file)
    return directory


def test_every_key_that_is_compared_is_one_of_the_schema(tmp_path: Path) -> None:
    keys = _flat(plain_values(_config(tmp_path)))
    for key in (*_IDENTITY, *_SAID):
        assert any(k == key or k.startswith(f"{key}.") for k in keys), key


def test_the_same_configuration_says_nothing(run: RunDirectory, tmp_path: Path) -> None:
    assert changes(run, _config(tmp_path)) is None
    assert changes(run, _config(tmp_path, "train.num_steps=99", "optimizer.lr=1e-4", "logging.progress=false")) is None


OTHERS = {
    "recipe": "sft",
    "algorithm.policy_loss.name": "gspo",
    "algorithm.advantage.estimator": "leave_one_out",
    "algorithm.preference.loss": "ipo",
    "rewards.model.kind": "process",
}


@pytest.mark.parametrize("key", _IDENTITY)
def test_another_run_is_refused_by_its_key(key: str, run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{key}: given .* another name"):
        changes(run, _config(tmp_path, f"{key}={OTHERS[key]}"))


def _other(key: str, value: Any) -> str:
    if key == "data.apply_chat_template":  # true, false or null
        return "true"
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int | float):
        return str(value + 1)
    return "[]" if isinstance(value, list) else "other"


SWEPT = [f"data.{field.name}" for field in dataclasses.fields(DataConfig) if field.name != "format"]


@pytest.mark.parametrize("key", [*SWEPT, "seed", "rollout.num_prompts_per_step", "rewards.functions", "model.hf_path"])
def test_what_moves_the_place_in_the_data_is_listed(key: str, run: RunDirectory, tmp_path: Path) -> None:
    before: Any = _flat(plain_values(_config(tmp_path)))[key]
    line = changes(run, _config(tmp_path, f"{key}={_other(key, before)}"))
    assert line is not None
    assert f"{key} was " in line


def test_without_a_checkpoint_a_folder_is_taken_anew(run: RunDirectory, tmp_path: Path) -> None:
    (run.checkpoints_dir / LATEST).unlink()
    assert changes(run, _config(tmp_path, "recipe=sft")) is None


def test_a_file_of_other_content_has_another_identity(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1\n2\n")
    before = file_identity(file)
    file.write_text("1\n3\n")
    assert file_identity(file) != before != ""
    assert file_identity(None) == ""
