"""The qualification without a GPU: it runs to its end and names everything that it did not run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_qualify
from tools.gpu_qualify import STAGES, Outcome, Stage, missing, run_stage, table

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_every_stage_is_reported_by_name() -> None:
    before = sorted(gpu_qualify.RESULTS.glob("*.json"))
    ended = subprocess.run(
        [str(ROOT / "tools/gpu_qualify.sh")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    for stage in STAGES:
        (line,) = (line for line in ended.stdout.splitlines() if line.startswith(f"{stage.name} "))
        assert "not run: no GPU" in line
    assert "transformer_engine is not installed" in ended.stdout
    assert sorted(gpu_qualify.RESULTS.glob("*.json")) == before, "a result is a GPU's"


def test_what_a_stage_lacks() -> None:
    stage = Stage("x", ("json", "no_such_module", "no_such.module"), 1.0, "")
    assert missing(stage, None) == "no GPU, no_such_module is not installed, no_such.module is not installed"
    assert missing(Stage("x", ("json", "no_such_module or json"), 1.0, ""), "H200") == ""
    assert missing(Stage("x", ("nowhere or no.where",), 1.0, ""), "H200") == "nowhere or no.where is not installed"


def test_a_stage_that_fails_or_hangs_is_an_outcome(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gpu_stages.py").write_text(
        "import json, sys, time\n"
        "name = sys.argv[1]\n"
        "time.sleep(60 if name == 'hangs' else 0)\n"
        "if name == 'fails': sys.exit('out of memory')\n"
        "print('noise'); print(json.dumps({'seconds': 0.12345, 'quick': '--quick' in sys.argv}))\n"
    )
    monkeypatch.setattr(gpu_qualify, "__file__", str(tmp_path / "gpu_qualify.py"))
    outcomes = [
        run_stage(Stage(name, (), limit, ""), quick=True)
        for name, limit in (("runs", 30), ("fails", 30), ("hangs", 0.5))
    ]
    assert outcomes == [
        Outcome("runs", "ran", found={"seconds": 0.12345, "quick": True}),
        Outcome("fails", "failed", "out of memory"),
        Outcome("hangs", "failed", "no end after 0.5 s"),
    ]
    assert [line.split() for line in table(outcomes).splitlines()] == [
        ["runs", "ran"],
        ["seconds", "0.1235"],
        ["quick", "True"],
        ["fails", "failed:", "out", "of", "memory"],
        ["hangs", "failed:", "no", "end", "after", "0.5", "s"],
    ]


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu_qualify.main(["--stages", "testz"])
    assert caught.value.code == 2
    assert "given 'testz', allowed: tests, curve, log_prob_head" in capsys.readouterr().err


def test_results_are_readable() -> None:
    """Committed results, as soon as there are some, have the form that the tool writes."""
    for file in gpu_qualify.RESULTS.glob("*.json"):
        record = json.loads(file.read_text())
        assert {stage["stage"] for stage in record["stages"]} <= {stage.name for stage in STAGES}
