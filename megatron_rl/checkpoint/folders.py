"""The folder of a run's checkpoints, in Megatron's layout: which there are, which is the latest, which are deleted.

    iter_0000010/                          the state after 10 steps
    .iter_0000010.partial/                 one that is being written, or was when the run was killed
    latest_checkpointed_iteration.txt      '10'

A checkpoint is written under its partial name and renamed when it is complete, then named as the latest. So a
checkpoint with its final name is complete, whenever the run was killed.
"""

import json
import os
import re
import shutil
from pathlib import Path

from megatron_rl.config.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"
SCORE = "score.json"
"""In a checkpoint: the metric that `keep_best` compares."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written."""


def cannot_write(folder: Path, error: BaseException) -> CheckpointError | None:
    """The user's error, if an error came from the operating system (no room, no permission); None if it did not.

    Libraries wrap such an error in one of their own. Some keep it as the cause; core's writers, which are processes,
    hand on its text alone.
    """
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    if inner is not None and inner.strerror is not None:
        return CheckpointError(f"{folder} cannot be written: {inner.strerror}; nothing was written")
    if number := re.search(r"\[Errno (\d+)\]", str(error)):
        return CheckpointError(f"{folder} cannot be written: {os.strerror(int(number[1]))}; nothing was written")
    return None


def iteration_folder(checkpoints: Path, step: int) -> Path:
    """Where the state after `step` steps lies."""
    return checkpoints / f"iter_{step:07d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where the state after `step` steps is written."""
    return checkpoints / f".iter_{step:07d}.partial"


def latest_step(checkpoints: Path) -> int | None:
    """Step of the latest complete checkpoint, or None.

    Raises:
        CheckpointError: the tracker file is damaged, or names a checkpoint that is not there.
    """
    tracker = checkpoints / LATEST
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise CheckpointError(f"{tracker}: expected a step number, got '{text[:40]}'")
    step = int(text)
    if not (iteration_folder(checkpoints, step) / "metadata.json").exists():
        raise CheckpointError(f"{tracker} names step {step}, but {iteration_folder(checkpoints, step)} is missing")
    return step


def steps_on_disk(checkpoints: Path) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    folders = (folder.name.removeprefix("iter_") for folder in checkpoints.glob("iter_*") if folder.is_dir())
    return sorted(int(number) for number in folders if number.isdecimal())


def start_partial(checkpoints: Path, step: int) -> Path:
    """An empty folder to write a checkpoint in; what killed runs left behind goes."""
    for left_behind in checkpoints.glob(".iter_*.partial"):
        shutil.rmtree(left_behind)
    folder = partial_folder(checkpoints, step)
    folder.mkdir(parents=True)
    return folder


def publish(checkpoints: Path, step: int) -> None:
    """Give a completely written checkpoint its name, and name it as the latest; on the disk when this returns."""
    partial, final = partial_folder(checkpoints, step), iteration_folder(checkpoints, step)
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    tracker = checkpoints / f".{LATEST}.partial"
    tracker.write_text(f"{step}\n")
    _sync(tracker)
    os.replace(tracker, checkpoints / LATEST)
    _sync(checkpoints)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_old(checkpoints: Path, step: int, keep_last: int | None, keep_best: int = 0) -> None:
    """Delete all but the newest and the best checkpoints of up to `step` steps.

    Later ones are there if the run was set back. They must not push out what it writes now.

    Args:
        keep_last: number of newest ones to keep; None: all.
        keep_best: number of those with the highest score to keep besides.
    """
    if keep_last is None:
        return
    written = [number for number in steps_on_disk(checkpoints) if number <= step]
    scores = {number: score(iteration_folder(checkpoints, number)) for number in written}
    scored = sorted((value, number) for number, value in scores.items() if value is not None)
    kept = {*written[-keep_last:], *(number for _, number in scored[len(scored) - keep_best :])}
    for number in written:
        if number not in kept:
            # Renamed first: a deletion that is cut short must not leave something that looks like a checkpoint.
            doomed = partial_folder(checkpoints, number)
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(iteration_folder(checkpoints, number), doomed)
            shutil.rmtree(doomed)


def score(folder: Path) -> float | None:
    """The score of a checkpoint, if it has one."""
    try:
        return float(json.loads((folder / SCORE).read_text())["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
