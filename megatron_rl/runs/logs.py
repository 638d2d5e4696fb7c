"""The logs of a run: metrics.jsonl, the same numbers in TensorBoard and Weights & Biases, and completions in rollouts/.

metrics.jsonl is the record of a run; the other two are views of it. Each `append` is one line, flushed before it
returns, so a killed run leaves whole lines and at most one torn one at the end. `position` puts everything before it on
the disk: a checkpoint stores the number it returns, and a resumed run calls `truncate` with it. What the killed run had
written after its checkpoint goes, and the steps that are made again are logged once. One process of a run builds a
`MetricsLog`: rank 0.

JSON has no nan and no infinity. They are written as null, which says "there was a number here and it was not finite";
`read_metrics` gives it back as nan.

A disk that is full, or a file system that is away for a while, does not end a run: rows that cannot be written are
kept and tried again with the next ones, and a checkpoint takes them along (`unwritten`), so that none is ever missing.

rollouts/step_0000010.jsonl has some completions of a step for people to read, one JSON object each: step, prompt_id,
source, prompt, completion, answer, reward, reward_terms, advantage, finish_reason, num_tokens, weight_version. A file
appears whole or not at all, and a resumed run writes the same names again, so there is nothing to repair besides steps
that the resumed run has not reached yet.

Nothing here imports torch before a `MetricsLog` is built: the report reads these files on any machine.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_rl.runs.directory import RunDirectory, write_atomically


class MetricsLog:
    """Appends rows to metrics.jsonl and shows them in TensorBoard and W&B."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        tensorboard: bool,
        wandb_project: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log for appending; a torn last line of a killed run is dropped.

        Args:
            run: the run's folder; made if needed.
            tensorboard: write event files to <run>/tensorboard.
            wandb_project: project at Weights & Biases, or None for none.
            name: the run's display name at W&B.
            config: the resolved configuration, shown by W&B.

        Raises:
            ValueError: wandb_project is given and the package is missing.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        # W&B first: its missing package is the one user mistake here, and it should leave no file behind.
        self._wandb = _start_wandb(run, wandb_project, name, config) if wandb_project is not None else None
        self._path = run.metrics_file
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        os.truncate(self._path, _whole_lines_end(self._path.read_bytes()))
        self._unwritten: list[bytes] = []
        self._last_step = self._read_last_step()
        self._tensorboard = _TensorBoard(run) if tensorboard else None

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row: "step" first, then the metrics by name, each with all its digits.

        The line has left the process when this returns: it outlives the process, though not yet a machine that loses
        power, which `position` and `close` see to. A step may have more rows than one (training, evaluation).

        Args:
            step: not less than that of the row before.
            metrics: numbers by name; anything that `float` takes. nan and infinities become null.

        Raises:
            ValueError: step is less than the last one, or a metric is called "step".
        """
        if self._last_step is not None and step < self._last_step:
            raise ValueError(f"{self._path}: step {step} after step {self._last_step}; truncate the log on resume")
        if "step" in metrics:
            raise ValueError('"step" cannot be the name of a metric')
        numbers = {key: _plain(metrics[key]) for key in sorted(metrics)}
        row = {"step": step} | {key: finite_or_null(value) for key, value in numbers.items()}
        self._unwritten.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._write()
        self._last_step = step
        if self._tensorboard:
            try:
                self._tensorboard.append(step, numbers)
            except OSError as error:
                self._tensorboard = None
                _warn(f"TensorBoard events cannot be written any more: {error}; metrics.jsonl has all numbers")
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def position(self) -> int:
        """Bytes of the log so far, all of them on the disk: the number that a checkpoint stores for `truncate`."""
        self._write()
        try:
            os.fsync(self._file.fileno())
            if self._tensorboard:
                self._tensorboard.flush()
        except OSError as error:
            _warn(f"{self._path} cannot be put on the disk: {error}")
        return os.path.getsize(self._path)

    @property
    def unwritten(self) -> str:
        """Rows that could not be written so far, for a checkpoint to take along."""
        return b"".join(self._unwritten).decode()

    def take_back(self, unwritten: str) -> None:
        """Write rows of `unwritten`, those that are not in the file by now."""
        for line in unwritten.splitlines(keepends=True):
            step = json.loads(line)["step"]
            if self._last_step is None or step > self._last_step:
                self._unwritten.append(line.encode())
                self._last_step = step
        self._write()

    def _write(self) -> None:
        """Write the rows that wait; what cannot be written goes on waiting."""
        if not self._unwritten:
            return
        size = os.path.getsize(self._path)
        content = b"".join(self._unwritten)
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            os.truncate(self._path, size)  # no part of a row
            _warn(f"{self._path} cannot be written: {error}; {len(self._unwritten)} rows are kept and tried again")
            return
        self._unwritten.clear()

    def truncate(self, position: int) -> None:
        """Drop all rows after `position`, a number that `position()` returned, possibly in another process.

        Raises:
            ValueError: the file has no line end there, so it is not the file that the checkpoint was made with.
        """
        content = self._path.read_bytes()
        if position > len(content) or content[position - 1 : position] not in (b"\n", b""):
            raise ValueError(
                f"{self._path}: the checkpoint was saved when this file had {position} bytes ending in a whole line; "
                f"it now has {len(content)}. Restore the file, or start a new run under another name"
            )
        os.truncate(self._path, position)
        self._last_step = self._read_last_step()
        if self._tensorboard:
            self._tensorboard.purge(0 if self._last_step is None else self._last_step + 1)

    def truncate_to_step(self, step: int) -> None:
        """Drop all rows of steps after `step`."""
        self._unwritten = [line for line in self._unwritten if json.loads(line)["step"] <= step]
        end = 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            of_line = _step_of(line)
            if of_line is not None and of_line > step:
                break
            end += len(line)
        self.truncate(end)

    def close(self) -> None:
        """Put everything on the disk and end the views."""
        self.position()
        self._file.close()
        if self._tensorboard:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_last_step(self) -> int | None:
        steps = (_step_of(line) for line in reversed(self._path.read_bytes().splitlines()))
        return next((step for step in steps if step is not None), None)


def _step_of(line: bytes) -> int | None:
    """The step of a row; None: the line is broken."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, also while a run writes it or after one was killed.

    A torn last line is left out, and so is, with a warning that names it, any that is no JSON object with a "step".
    null becomes nan.

    Raises:
        FileNotFoundError: no such file.
    """
    content = Path(path).read_bytes()
    rows = []
    for number, line in enumerate(content[: _whole_lines_end(content)].splitlines(), start=1):
        if _step_of(line) is None:
            _warn(f'{path}:{number}: left out: expected a JSON object with "step", got {line[:80]!r}')
            continue
        row = json.loads(line)
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def finite_or_null(value: Any) -> Any:
    """`value` with every nan and infinity replaced by None, inside dictionaries and lists too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def _warn(message: str) -> None:
    print(f"megatron-rl: {message}", file=sys.stderr, flush=True)


def _plain(value: float) -> float:
    """A Python number. Counts stay integers; NumPy and torch scalars become floats, which json can write."""
    return value if isinstance(value, int) else float(value)


def _whole_lines_end(content: bytes) -> int:
    """Bytes up to and with the last line end."""
    return content.rfind(b"\n") + 1


class _TensorBoard:
    """TensorBoard's own writer: it needs no torch, and writes in a thread of its own."""

    def __init__(self, run: RunDirectory) -> None:
        # Imported here because it takes 0.2 s, which readers of a log need not pay.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(str(run.tensorboard_dir), max_queue_size=1000, flush_secs=10)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(step=step, wall_time=time.time(), summary=summary))

    def purge(self, step: int) -> None:
        """Make TensorBoard forget what was written before for `step` and later steps: a session START says so."""
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(step=step, wall_time=time.time(), session_log=start))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _start_wandb(run: RunDirectory, project: str, name: str | None, config: Mapping[str, Any] | None) -> Any:
    """Begin or resume the W&B run. A resumed run has the same id, and W&B ignores steps that it already has."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            f"logging.wandb_project is {project!r}, but the package wandb is not installed: "
            "pip install 'megatron-rl[wandb]', or set logging.wandb_project=null"
        ) from error
    known_id = run.wandb_id_file.read_text(encoding="utf-8").strip() if run.wandb_id_file.exists() else None
    started = wandb.init(
        project=project, name=name, config=dict(config or {}), id=known_id, resume="allow", dir=str(run.path)
    )
    run.logs_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run.wandb_id_file, started.id + "\n")
    return started


def write_rollouts(run: RunDirectory, step: int, records: list[dict[str, Any]]) -> Path:
    """Write the completions of `step`, replacing what an interrupted run left there.

    Numbers that are not finite become null, as in metrics.jsonl. Text stays UTF-8; a lone surrogate, which a decoder
    can leave behind and UTF-8 cannot hold, becomes '?'.

    Returns:
        The file.
    """
    lines = [json.dumps(finite_or_null(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    run.rollouts_dir.mkdir(parents=True, exist_ok=True)
    file = run.rollout_file(step)
    write_atomically(file, "".join(lines).encode("utf-8", errors="replace").decode("utf-8"))
    return file


def rollout_steps(run: RunDirectory) -> list[int]:
    """Steps that have completions on disk, ascending."""
    names = (file.stem.removeprefix("step_") for file in run.rollouts_dir.glob("step_*.jsonl"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_rollouts(run: RunDirectory, step: int) -> list[dict[str, Any]]:
    """The records of `step`. Raises FileNotFoundError if it has none, json.JSONDecodeError if the file was damaged."""
    # Not splitlines(): it would also split at U+2028 and its like, which JSON leaves unescaped inside strings.
    lines = run.rollout_file(step).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def truncate_rollouts_to_step(run: RunDirectory, step: int) -> None:
    """Drop completions of steps after `step`: on resume, those of steps that will be made again."""
    for later in rollout_steps(run):
        if later > step:
            run.rollout_file(later).unlink()
