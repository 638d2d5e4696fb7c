import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.logs import MetricsLog, read_metrics


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "demo")


def open_log(run: RunDirectory, **views) -> MetricsLog:
    return MetricsLog(run, tensorboard=views.pop("tensorboard", False), **views)


def test_a_row_is_one_line_with_the_step_first_and_sorted_names(run):
    with open_log(run) as log:
        log.append(3, {"reward/mean": 0.1, "optim/lr": 1e-06, "sync/version": 7})
    assert run.metrics_file.read_text() == '{"step": 3, "optim/lr": 1e-06, "reward/mean": 0.1, "sync/version": 7}\n'


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_bit_of_a_number_comes_back(tmp_path_factory, value):
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    with open_log(run) as log:
        log.append(0, {"x": value})
    # repr tells 0.0 from -0.0, which == does not.
    assert repr(read_metrics(run.metrics_file)[0]["x"]) == repr(value)


def test_numpy_scalars_are_logged_as_the_number_they_are(run):
    with open_log(run) as log:
        log.append(0, {"half": np.float32(0.5), "mean": np.float64(0.1), "count": np.int64(3)})
    assert read_metrics(run.metrics_file) == [{"step": 0, "count": 3.0, "half": 0.5, "mean": 0.1}]


def test_non_finite_numbers_stay_valid_json_and_come_back_as_nan(run):
    with open_log(run) as log:
        log.append(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    strict = json.loads(run.metrics_file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == {"step": 0, "a": None, "b": None, "c": None, "d": 1.0}
    row = read_metrics(run.metrics_file)[0]
    assert [math.isnan(row[name]) for name in "abcd"] == [True, True, True, False]


def test_a_row_can_be_read_before_the_log_is_closed(run):
    log = open_log(run)
    log.append(1, {"x": 1.0})
    assert read_metrics(run.metrics_file) == [{"step": 1, "x": 1.0}]
    log.close()


def test_resume_from_a_position_leaves_the_file_of_an_uninterrupted_run(tmp_path):
    """Steps 1-5 in one go, and with a kill after 4 whole and a half line, resumed from a checkpoint of step 2."""
    whole, killed = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "killed")
    with open_log(whole) as log:
        for step in range(1, 6):
            log.append(step, {"x": step / 3})
    log = open_log(killed)
    for step in range(1, 5):
        log.append(step, {"x": step / 3})
        if step == 2:
            position = log.position()
    with killed.metrics_file.open("a") as torn:
        torn.write('{"step": 5, "x": 1.66')
    with open_log(killed) as log:
        log.truncate(position)
        for step in range(3, 6):
            log.append(step, {"x": step / 3})
    assert killed.metrics_file.read_bytes() == whole.metrics_file.read_bytes()


def test_truncate_to_step_keeps_all_rows_of_that_step(run):
    log = open_log(run)
    for step, name in [(0, "eval"), (1, "train"), (1, "eval"), (2, "train")]:
        log.append(step, {name: 1.0})
    log.truncate_to_step(1)
    assert [row["step"] for row in read_metrics(run.metrics_file)] == [0, 1, 1]
    log.append(2, {"train": 2.0})
    log.truncate_to_step(-1)
    assert read_metrics(run.metrics_file) == []
    log.append(0, {"eval": 3.0})
    assert read_metrics(run.metrics_file) == [{"step": 0, "eval": 3.0}]
    log.close()


def test_a_position_of_another_file_is_refused_and_nothing_is_lost(run):
    with open_log(run) as log:
        log.append(1, {"x": 1.0})
        before = run.metrics_file.read_bytes()
        for position in (len(before) + 1, len(before) - 3):
            with pytest.raises(ValueError, match=rf"metrics\.jsonl.* {position} bytes .*it now has {len(before)}"):
                log.truncate(position)
        assert run.metrics_file.read_bytes() == before


def test_opening_drops_a_torn_line_so_that_the_next_row_does_not_join_it(run):
    run.path.mkdir()
    run.metrics_file.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x"')
    with open_log(run) as log:
        log.append(2, {"x": 2.0})
    assert read_metrics(run.metrics_file) == [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}]


def test_steps_that_go_back_are_refused_also_after_reopening(run):
    with open_log(run) as log:
        log.append(5, {"x": 1.0})
    with open_log(run) as log, pytest.raises(ValueError, match="step 4 after step 5; truncate"):
        log.append(4, {"x": 1.0})


def test_step_is_no_name_of_a_metric(run):
    with open_log(run) as log, pytest.raises(ValueError, match="step"):
        log.append(1, {"step": 2.0})


@pytest.mark.parametrize("damaged", ["{oops", "[1, 2]", '{"x": 1}', "\x00\x00", '{"step": "2"}'])
def test_a_broken_line_costs_that_line(run, damaged, capsys):
    run.path.mkdir()
    run.metrics_file.write_text('{"step": 1}\n{"step": 2, "x": 0.')
    assert read_metrics(run.metrics_file) == [{"step": 1}]  # torn: it was being written
    run.metrics_file.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
    assert read_metrics(run.metrics_file) == [{"step": 1}, {"step": 3}]
    assert "metrics.jsonl:2: left out" in "".join(capsys.readouterr())
    with open_log(run) as log:
        log.truncate_to_step(1)
    assert read_metrics(run.metrics_file) == [{"step": 1}]


def test_tensorboard_shows_each_step_of_a_resumed_run_once(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(run, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.append(step, {"reward/mean": float(step)})
    with open_log(run, tensorboard=True) as log:
        log.truncate_to_step(1)
        for step in (2, 3, 4):
            log.append(step, {"reward/mean": 10.0 * step})
    events = EventAccumulator(str(run.tensorboard_dir))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert shown == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]


def test_no_tensorboard_folder_without_tensorboard(run):
    with open_log(run) as log:
        log.append(1, {"x": 1.0})
    assert not run.tensorboard_dir.exists()


def test_wandb_without_the_package_is_one_clear_line_and_leaves_no_log(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself puts there for "cannot be imported"
    with pytest.raises(ValueError, match=r"logging\.wandb_project is 'demo', but the package wandb is not installed"):
        open_log(run, wandb_project="demo")
    assert not run.metrics_file.exists()


def test_wandb_goes_on_in_the_same_run_after_a_resume(run, monkeypatch):
    """W&B needs its servers; what is ours to prove is what it is told."""
    told = []
    fake = ModuleType("wandb")

    def init(**arguments):
        told.append(("init", arguments["project"], arguments["name"], arguments["config"], arguments["id"]))
        return SimpleNamespace(
            id=arguments["id"] or "abc123",
            log=lambda row, step: told.append(("log", step, row)),
            finish=lambda: told.append(("finish",)),
        )

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        with open_log(run, wandb_project="demo", name="first", config={"seed": 1}) as log:
            log.append(step, {"x": float(step)})
    assert told == [
        ("init", "demo", "first", {"seed": 1}, None),
        ("log", 1, {"x": 1.0}),
        ("finish",),
        ("init", "demo", "first", {"seed": 1}, "abc123"),
        ("log", 2, {"x": 2.0}),
        ("finish",),
    ]


def test_a_full_disk_loses_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        run = RunDirectory(tmp_path / "run")
        log = MetricsLog(run, tensorboard=False)
        log.append(1, {"a": 1.0})
        filler = tmp_path / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        for step in range(2, 100):  # 99 rows of about 90 bytes do not fit into what is left of a page
            log.append(step, {"a": step / 7, "b" * 50: 1.0})
        assert "No space left" in capsys.readouterr().err
        on_disk = read_metrics(run.metrics_file)
        kept = [json.loads(line)["step"] for line in log.unwritten.splitlines()]
        assert [row["step"] for row in on_disk] + kept == list(range(1, 100))
        assert kept
        unwritten = log.unwritten
        filler.unlink()
        log.append(100, {"a": 0.0})
        assert [row["step"] for row in read_metrics(run.metrics_file)] == list(range(1, 101))
        assert log.unwritten == ""
        # A run that resumes at step 99 gets the rows that only its checkpoint has, and none twice.
        log.truncate_to_step(kept[0] - 1)
        log.take_back(unwritten)
        log.take_back(unwritten)
        assert [row["step"] for row in read_metrics(run.metrics_file)] == list(range(1, 100))
        log.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
