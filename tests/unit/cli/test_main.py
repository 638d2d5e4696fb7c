"""The command line's own part: exit codes, which mistakes are whose, and the commands' arguments."""

import argparse
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rl.cli import doctor
from megatron_rl.cli.main import main
from megatron_rl.config.errors import ConfigError
from megatron_rl.models.capabilities import Library


def raising(error: Exception) -> object:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


def test_a_users_mistake_is_one_line_and_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(doctor, "run", raising(ConfigError("seed: given\n  -1")))
    assert main(["doctor"]) == 2
    assert capsys.readouterr() == ("", "megatron-rl: error: seed: given -1\n")


def test_our_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", raising(ValueError("ours")))
    with pytest.raises(ValueError, match="ours"):
        main(["doctor"])


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["convert", "hf-to-megatron", "--hf-path", "x"]])
def test_argparse_errors_have_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_convert_hands_on_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    module = ModuleType("megatron_rl.checkpoint.convert")  # stands in, since the real one imports Megatron
    module.hf_to_megatron = module.megatron_to_hf = lambda **arguments: calls.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_rl.checkpoint.convert", module)
    assert main(["convert", "hf-to-megatron", "--hf-path", "a", "--output", "b"]) == 0
    assert main(["convert", "megatron-to-hf", "--checkpoint", "c", "--hf-path", "a", "--output", "d", "--verify"]) == 0
    assert calls == [
        {"hf_path": Path("a"), "output": Path("b"), "verify": False},
        {"checkpoint": Path("c"), "hf_path": Path("a"), "output": Path("d"), "verify": True},
    ]


def test_overrides_stand_before_and_after_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("megatron_rl.cli.train.train", lambda arguments: seen.append(arguments.overrides) or 0)
    assert main(["train", "run.yaml", "a=1", "--dry-run", "b=2"]) == 0
    assert seen == [["a=1", "b=2"]]
    for wrong in (["train", "run.yaml", "--dry", "--nodes", "2"], ["report", "folder", "a=1"]):
        with pytest.raises(SystemExit) as raised:
            main(wrong)
        assert raised.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_doctor_says_what_is_there_and_what_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    absent = Library("nothing", ("no-such-distribution",), "a", "b fails")
    present = Library("numbers", ("no-such-distribution", "numpy"), "arrays", "c fails")
    monkeypatch.setattr(doctor, "LIBRARIES", (absent, present))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split(maxsplit=2) == ["nothing", "absent", "b fails"]
    assert lines[-3].startswith("numbers")
    assert lines[-3].endswith("  arrays")
    assert lines[-1].startswith("a run here takes: layers ")
    monkeypatch.setattr(doctor, "LIBRARIES", (Library("x", ("no-such-distribution",), "a", "b", required=True),))
    assert main(["doctor"]) == 1
