"""A user's mistake, as a real command: one line on stderr, exit code 2, and no rank was started.

Speed is promised by what is not imported: no torch, no Megatron, no vLLM.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint

# Runs the command and then lists, on stdout, which of the slow packages it imported.
COMMAND = """
import sys
from megatron_rl.cli.main import main
code = main(sys.argv[1:])
print(*(name for name in ("torch", "megatron.core", "vllm") if name in sys.modules))
sys.exit(code)
"""
RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
RUN: dict[str, Any] = {
    "name": "run",
    "model": {"hf_path": "model"},
    "data": {"train": "train.jsonl", "max_prompt_tokens": 64},
    "rewards": {"functions": [{"name": "exact_match"}]},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", seed=0)  # 2 layers, 4 heads of 2 groups


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of a user with a sound configuration: run.yaml (JSON is YAML), model/, train.jsonl."""
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "run.yaml").write_text(json.dumps(RUN))
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "my_rewards.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "runs").exists(), "ranks were started"


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    rank_names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in rank_names}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        env=inherited | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,  # against a hang alone
        check=False,
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert result.stdout == "\n", "a slow package was imported"
    assert result.stderr.startswith("megatron-rl: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("megatron-rl: error: ").rstrip("\n")


def test_a_sound_configuration_and_its_dry_run(folder: Path) -> None:
    result = run("train", "run.yaml", "parallel.tensor_model_parallel_size=2", "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    assert "layout   2 ranks = tensor 2 x pipeline 1 x data 1\n" in result.stdout
    assert "data     train.jsonl, 1 rows\n" in result.stdout
    # Losses are functions on tensors; to check a run nothing else that is slow was imported.
    assert result.stdout.endswith("of prompt and response\ntorch\n")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "override 'optimizer.lrr=1': optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        (
            ["train.num_steps=many"],
            "override 'train.num_steps=many': train.num_steps: given 'many', allowed: an integer",
        ),
        (
            ["parallel.tensor_model_parallel_size=3"],
            "parallel.tensor_model_parallel_size: given 3, allowed: a divisor of the model's 4 attention heads",
        ),
        (
            ["parallel.pipeline_model_parallel_size=4"],
            "parallel.pipeline_model_parallel_size: given 4, allowed: a divisor of the model's 2 layers",
        ),
        (["data.train=nowhere.jsonl"], "data.train: given 'nowhere.jsonl', allowed: an existing file"),
        (["model.hf_path=nowhere"], "model.hf_path: given 'nowhere', which is no folder"),
    ],
)
def test_configuration(folder: Path, overrides: list[str], message: str) -> None:
    assert error_line(run("train", "run.yaml", *overrides)).startswith(message)


def test_a_model_that_its_family_does_not_build(folder: Path) -> None:
    """Told from config.json, before torch is imported."""
    file = folder / "model/config.json"
    moe = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 5}
    moe["model_type"] = "qwen3_moe"
    file.write_text(json.dumps(json.loads(file.read_text()) | moe | {"moe_intermediate_size": 48}))
    message = "num_experts_per_tok: 5 in config.json of Qwen3MoeForCausalLM; allowed: an integer in [1, 4]"
    assert error_line(run("train", "run.yaml")) == message
    assert error_line(run("train", "run.yaml", environment=RANK)) == message  # before it waits for ranks 1 and 2


def test_quantised_weights_are_for_conversion_and_fine_tuning(folder: Path) -> None:
    file = folder / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    line = error_line(run("train", "run.yaml"))
    assert line.startswith(
        "model.hf_path: given 'model', whose weights are quantised (mxfp4), allowed: one that is not"
    )
    # Fine-tuning has no engine: there the first complaint is of the data, which have no responses.
    line = error_line(run("train", "run.yaml", "recipe=sft", "train.global_batch_size=1"))
    assert line.startswith("train.jsonl:1: no key 'response'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_hardware_that_is_not_there(folder: Path) -> None:
    """Found by importing torch, and yet before a rank is started."""
    ended = run("train", "run.yaml", "model.fp8=hybrid", "model.params_dtype=bfloat16")
    assert ended.returncode == 2
    message = "megatron-rl: error: model.fp8: given hybrid, allowed: null: there is no GPU\n"
    assert ended.stderr == message


def test_unknown_key_in_a_file(folder: Path) -> None:
    (folder / "typo.yaml").write_text("base: run.yaml\nrollout:\n  samplng: {temperature: 1.0}\n")
    message = "typo.yaml: rollout.samplng: unknown key; did you mean rollout.sampling?"
    assert error_line(run("train", "typo.yaml")) == message


def test_a_layout_that_does_not_divide_the_ranks(folder: Path) -> None:
    result = run("train", "run.yaml", "parallel.tensor_model_parallel_size=2", environment=RANK)
    assert "tensor_model_parallel_size 2 x pipeline_model_parallel_size 1 for 3 ranks" in error_line(result)


def _delete_weights(folder: Path) -> None:
    (folder / "model/model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    file = folder / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _break_line(folder: Path) -> None:
    with (folder / "train.jsonl").open("a") as stream:
        stream.write('{"prompt": "1+2="')


def _empty_data(folder: Path) -> None:
    (folder / "train.jsonl").write_text("")


def _change_config(folder: Path) -> None:
    file = folder / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 192}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_change_config, ["model/model.safetensors", "'model.layers.0.mlp.gate_proj.weight'", "implies (192, 96)"]),
        (_delete_weights, ["model.hf_path", "no weights in 'model'"]),
        (_cut_weights, ["model.hf_path", "model/model.safetensors is truncated"]),
        (_break_line, ["train.jsonl:2"]),
        (_empty_data, ["train.jsonl"]),
    ],
)
def test_files(folder: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    damage(folder)
    line = error_line(run("train", "run.yaml"))
    assert all(word in line for word in words), line
    assert error_line(run("train", "run.yaml", environment=RANK)) == line  # before it waits for ranks 1 and 2


def test_a_prompt_longer_than_allowed(folder: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "x" * 65, "answer": "y"}) + "\n")  # a token per byte
    line = error_line(run("train", "run.yaml"))
    assert "train.jsonl:1" in line
    assert "65" in line
    assert "64" in line


def test_a_context_longer_than_the_model_has(folder: Path) -> None:
    line = error_line(run("train", "run.yaml", "rollout.sampling.max_response_tokens=449"))
    assert line.startswith("data.max_prompt_tokens + rollout.sampling.max_response_tokens: given 513")  # 64 + 449
    assert line.endswith("at most 512, the model's max_position_embeddings")


def test_a_reward_that_cannot_be_imported(folder: Path) -> None:
    line = error_line(run("train", "run.yaml", "rewards.functions=[{name: 'my_rewards:score'}]"))
    assert "rewards.functions[0].name" in line
    assert "nowhere_to_be_found" in line


def test_evaluation_needs_data(folder: Path) -> None:
    assert error_line(run("evaluate", "run.yaml")) == "data.eval: given null, allowed: a file, for evaluate"


def test_a_report_needs_a_run(folder: Path) -> None:
    assert error_line(run("report", "nowhere")).startswith("RUN_DIR: given 'nowhere', allowed: the folder of a run")


def test_the_module_is_the_command(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "megatron_rl", "train", "nowhere.yaml"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "megatron-rl: error: nowhere.yaml: no such configuration file\n"
