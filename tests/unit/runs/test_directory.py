import json
import sys
from importlib.metadata import version
from subprocess import run as start

import pytest

from megatron_rl.runs.directory import RunDirectory, installed_versions, write_atomically


def test_names_are_those_that_the_documentation_promises(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "demo")
    promised = {
        run.config_file: "config.yaml",
        run.metrics_file: "metrics.jsonl",
        run.rollout_file(10): "rollouts/step_0000010.jsonl",
        run.checkpoints_dir: "checkpoints",
        run.hf_dir: "hf",
        run.report_file: "report.html",
        run.logs_dir: "logs",
        run.tensorboard_dir: "tensorboard",
    }
    assert {file.relative_to(run.path).as_posix() for file in promised} == set(promised.values())
    assert not run.path.exists(), "naming files touches no disk"


def test_create_can_be_repeated_and_records_versions_that_are_installed(tmp_path):
    run = RunDirectory(tmp_path / "demo")
    run.create()
    run.rollout_file(1).write_text("kept\n")
    run.create()
    assert run.rollout_file(1).read_text() == "kept\n"
    versions = json.loads(run.versions_file.read_text())
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == version("torch")


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr("megatron_rl.runs.directory.DISTRIBUTIONS", ("torch", "no-such-package"))
    assert list(installed_versions()) == ["python", "torch"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "config.yaml"
    write_atomically(file, "old\n")
    # A lone surrogate cannot be encoded: the write fails half-way.
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \ud800\n")
    assert file.read_text() == "old\n"


def test_what_the_report_needs_imports_neither_torch_nor_tensorboard():
    code = (
        "import sys, megatron_rl.report.report, megatron_rl.runs.progress;"
        "sys.exit(' '.join({'torch', 'tensorboard', 'megatron.core', 'vllm'} & set(sys.modules)) or None)"
    )
    result = start([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
