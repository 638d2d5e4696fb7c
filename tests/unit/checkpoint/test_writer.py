"""Checkpoints appear whole or not at all, their damage is found, and the ones that may go are the right ones."""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_rl.checkpoint.folders import (
    LATEST,
    SCORE,
    CheckpointError,
    delete_old,
    iteration_folder,
    latest_step,
    start_partial,
    steps_on_disk,
)
from megatron_rl.checkpoint.integrity import DIGESTS, check_digests, check_files
from megatron_rl.checkpoint.training_state import _candidates, _problem
from megatron_rl.checkpoint.writer import CheckpointWriter


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(elements: int = 1000) -> dict[str, Any]:
    values = torch.arange(elements, dtype=torch.float32)
    return {"w": ShardedTensor.from_rank_offsets("w", values), "layout": {"world": 1}}


def write(folder: Path, *steps: int, **settings: Any) -> CheckpointWriter:
    writer = CheckpointWriter(folder, **settings)
    for step in steps:
        writer.save(step, state())
    writer.finish()
    return writer


def test_a_checkpoint_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.save(5, state(2_000_000))
    assert steps_on_disk(tmp_path) == []
    writer.finish()
    assert (steps_on_disk(tmp_path), latest_step(tmp_path)) == ([5], 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", LATEST]
    folder = iteration_folder(tmp_path, 5)
    digests = json.loads((folder / DIGESTS).read_text())
    assert digests.keys() == {path.name for path in folder.iterdir()} - {DIGESTS}
    assert writer.poll()


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    """Training goes on while the thread writes; both checkpoints go through the same buffers."""
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2):
        changing = torch.full((3_000_000,), float(step))
        writer.save(step, {"w": ShardedTensor.from_rank_offsets("w", changing)})
        changing.fill_(-1.0)
    writer.finish()
    for step in (1, 2):
        content = dist_checkpointing.load_plain_tensors(str(iteration_folder(tmp_path, step)))["w"]
        assert torch.equal(content, torch.full((3_000_000,), float(step)))


def test_a_slow_folder_does_not_hold_training_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that takes its time, as a network's may, is stood in for by one that writes when it is told to."""
    written = threading.Event()
    writes = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def write_late(*arguments: Any, **named: Any) -> Any:
        assert written.wait(60.0)
        return writes(*arguments, **named)

    monkeypatch.setattr(filesystem_async.FileSystemWriterAsync, "write_preloaded_data", write_late)
    writer = CheckpointWriter(tmp_path)
    writer.save(1, state())
    assert [writer.poll() for _ in range(3)] == [False] * 3  # the steps that training makes meanwhile
    assert steps_on_disk(tmp_path) == []
    written.set()
    writer.finish()
    assert steps_on_disk(tmp_path) == [1]


def flip(content: bytes) -> bytes:
    at = max(len(content) - 200, 0)
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("name", ["__0_0.distcp", "metadata.json", ".metadata"])
@pytest.mark.parametrize("damage", [flip, lambda content: content[:-1], lambda content: b""])
def test_damage_of_any_file_is_found_and_named(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    write(tmp_path, 3)
    folder = iteration_folder(tmp_path, 3)
    assert _problem(folder) is None
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    assert str(folder / name) in str(_problem(folder))


def test_parts_of_the_digest_check_cover_all_files(tmp_path: Path) -> None:
    write(tmp_path, 3)
    folder = iteration_folder(tmp_path, 3)
    for file in [path for path in folder.iterdir() if path.name != DIGESTS]:
        content = file.read_bytes()
        file.write_bytes(content + b"x")
        failed = 0
        for part in range(3):
            try:
                check_digests(folder, part=part, num_parts=3)
            except CheckpointError:
                failed += 1
        assert failed == 1, file
        file.write_bytes(content)
    check_files(folder)


def test_candidates_begin_with_the_one_that_is_named_and_go_back(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6)
    assert _candidates(tmp_path) == ([6, 4, 2], None)
    (tmp_path / LATEST).write_text("4\n")  # set back on purpose
    assert _candidates(tmp_path) == ([4, 2], None)
    (tmp_path / LATEST).write_text("")  # as a power cut may leave it
    steps, problem = _candidates(tmp_path)
    assert steps == [6, 4, 2]
    assert "expected a step number, got ''" in str(problem)
    (tmp_path / LATEST).unlink()
    assert _candidates(tmp_path) == ([6, 4, 2], None)
    assert _candidates(tmp_path / "none") == ([], None)


def test_the_best_are_kept_besides_the_last(tmp_path: Path) -> None:
    for step, value in ((1, 0.1), (2, 0.9), (3, 0.5), (4, None), (5, 0.2)):
        folder = iteration_folder(tmp_path, step)
        folder.mkdir()
        if value is not None:
            (folder / SCORE).write_text(json.dumps({"value": value}))
    delete_old(tmp_path, 5, keep_last=1, keep_best=2)
    assert steps_on_disk(tmp_path) == [2, 3, 5]
    delete_old(tmp_path, 5, keep_last=1, keep_best=0)
    assert steps_on_disk(tmp_path) == [5]


def test_notes_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.save(1, state(), notes={SCORE: '{"value": 2}\n'})
    writer.finish()
    folder = iteration_folder(tmp_path, 1)
    assert (folder / SCORE).read_text() == '{"value": 2}\n'
    assert SCORE in json.loads((folder / DIGESTS).read_text())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def save_and_finish(writer: CheckpointWriter, what: dict[str, Any]) -> None:
    writer.save(2, what)
    writer.finish()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_checkpoints_before(small_disk: Path, asynchronous: bool) -> None:
    writer = CheckpointWriter(small_disk, asynchronous=asynchronous)
    writer.save(1, state())
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 cannot be written: rank 0: .*No space left") as e:
        save_and_finish(writer, state(2_000_000))  # 8 MB
    assert "\n" not in str(e.value)
    assert (steps_on_disk(small_disk), latest_step(small_disk)) == ([1], 1)
    assert _problem(iteration_folder(small_disk, 1)) is None
    writer.save(3, state())  # there is room again: what was written of step 2 is gone
    writer.finish()
    assert latest_step(small_disk) == 3


def test_a_disk_without_room_for_the_small_files(small_disk: Path) -> None:
    writer = write(small_disk, 1)
    size = 4 * 1024 * 1024
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while size:
                filler.write(bytes(4096))
                size -= 4096
        except OSError:
            pass
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written: rank 0: .*\(0 MiB are free\)"):
        save_and_finish(writer, state())
    assert latest_step(small_disk) == 1


def test_a_read_only_folder(small_disk: Path) -> None:
    writer = write(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written: rank 0: OSError: .*Read-only file system"):
        writer.save(2, state())
    assert latest_step(small_disk) == 1


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".iter_0000002.partial"
    left.mkdir()
    (left / "half").write_bytes(b"x")
    assert list(start_partial(tmp_path, 3).iterdir()) == []
    assert not left.exists()
