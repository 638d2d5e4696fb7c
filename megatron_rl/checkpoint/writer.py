"""Writing checkpoints: in the background, wholly or not at all.

    save     the state is copied to the host (training stands still); then a thread writes it, and digests
    poll     at every step: once all ranks' threads are done, the checkpoint gets its index, its digests and its name
    finish   waits for that

The copy goes into buffers that are kept, so only the first one pays for fresh memory. It is made before core plans what
goes where: core would clone every tensor that is a view, as parameters in a gradient buffer are, and be copied from
then. Writing is a thread: torch's and the operating system's part of it runs without the interpreter's lock, and a
process that is forked from one with CUDA, vLLM and communication threads is better avoided. Synchronous saving is the
same, waited for.

A rank that cannot write (disk full, read-only) reports it at the next collective; all then raise the same error, and
what was written of that checkpoint is deleted.
"""

import contextlib
import inspect
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.checkpoint.folders import CheckpointError, delete_old, partial_folder, publish, start_partial
from megatron_rl.checkpoint.integrity import digest, write_digests
from megatron_rl.device import HAS_CUDA

_ABANDON_SECONDS = 60.0
"""How long a failed run waits for its writing thread."""

_Bucket = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]
"""(path, name, (byte items, tensor items)) of one file, as core plans it."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    finalize: list[Any]
    """Core's own last actions: the index and the format file; collective."""
    results: Any
    """Where core looks for what was written."""
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    """When this rank's files were written, by the same clock."""
    buckets: list[_Bucket] = field(default_factory=list)
    """The files of this rank."""
    transforms: Any = None
    thread: threading.Thread | None = None
    written: dict[int, Any] = field(default_factory=dict)
    digests: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None


class CheckpointWriter:
    """Writes the checkpoints of a run into one folder; one at a time. Every method is collective over all ranks."""

    def __init__(
        self, checkpoints: Path, *, asynchronous: bool = True, keep_last: int | None = None, keep_best: int = 0
    ) -> None:
        """Args:
        checkpoints: the folder.
        asynchronous: False waits for each checkpoint to be complete.
        keep_last, keep_best: see `delete_old`.
        """
        self.checkpoints = checkpoints
        self.asynchronous = asynchronous
        self.keep_last, self.keep_best = keep_last, keep_best
        self.longest_seconds = 0.0
        """Longest that a checkpoint has taken, from its beginning to this rank's last byte."""
        self.on_published: Callable[[int], object] = lambda step: None
        """Called on rank 0 with the step of each checkpoint that is complete."""
        self._pending: _Pending | None = None
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._is_validated = False

    def save(self, step: int, state: dict[str, Any], *, notes: Mapping[str, str] | None = None) -> None:
        """Begin to write a state (`training_state.to_save`) as that after `step` steps.

        Args:
            state: of the same form as this writer's earlier ones; its entries are changed.
            notes: small text files, by name, that belong to the checkpoint; those of rank 0 are written.

        Raises:
            CheckpointError: this or the previous checkpoint cannot be written.
        """
        self.finish()
        folder = partial_folder(self.checkpoints, step)
        self._agree(step, self._start_folder(step, notes or {}) if dist.get_rank() == 0 else None)
        self._stage(state)
        try:
            # That every part is written by one rank is a matter of the state's form.
            pending = _plan(state, folder, step, validate=not self._is_validated)
        except (OSError, RuntimeError) as error:
            raise _cannot_write(self.checkpoints, step, f"rank {dist.get_rank()}: {_reason(error)}") from error
        self._is_validated = True
        if HAS_CUDA:
            torch.cuda.synchronize()  # the copies were on their way while core planned
        if pending.buckets:
            pending.thread = threading.Thread(target=_write, args=(pending,), name=f"checkpoint {step}", daemon=True)
            pending.thread.start()
        self._pending = pending
        if not self.asynchronous:
            self.finish()

    def poll(self) -> bool:
        """Complete the checkpoint that is being written, if all ranks have; whether none is left to complete."""
        if self._pending is None:
            return True
        thread = self._pending.thread
        if any(_gather(thread is not None and thread.is_alive())):
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            CheckpointError: it cannot be; the rank and the reason are named.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.thread is not None:
            pending.thread.join()
        self.longest_seconds = max(self.longest_seconds, (pending.ended or time.monotonic()) - pending.started)
        self._agree(pending.step, pending.error)
        try:
            _complete(pending)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise _cannot_write(self.checkpoints, pending.step, f"rank {dist.get_rank()}: {_reason(error)}") from error
        digests = _gather(pending.digests)
        problem = None
        if dist.get_rank() == 0:
            try:
                write_digests(partial_folder(self.checkpoints, pending.step), digests)
                publish(self.checkpoints, pending.step)
                self.on_published(pending.step)
                delete_old(self.checkpoints, pending.step, self.keep_last, self.keep_best)
            except OSError as error:
                problem = _reason(error)
        self._agree(pending.step, problem)

    def abandon(self) -> None:
        """Of a run that has failed: let the writing end, without completing the checkpoint. Not collective."""
        if self._pending is not None and self._pending.thread is not None:
            # An interpreter that ends while a thread is inside torch aborts, and hides the error that ended the run.
            self._pending.thread.join(_ABANDON_SECONDS)
        self._pending = None

    def _start_folder(self, step: int, notes: Mapping[str, str]) -> str | None:
        """Make the folder; why it cannot be made."""
        try:
            folder = start_partial(self.checkpoints, step)
            for name, text in notes.items():
                (folder / name).write_text(text)
        except OSError as error:
            return _reason(error)
        return None

    def _agree(self, step: int, problem: str | None) -> None:
        """Raise the same error on all ranks if one has a problem."""
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(_gather(problem)) if text is not None]
        if not problems:
            return
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(partial_folder(self.checkpoints, step))
        raise _cannot_write(self.checkpoints, step, problems[0])

    def _stage(self, state: dict[str, Any]) -> None:
        """Put copies, in this writer's buffers, in the place of the tensors that this rank writes."""
        apply_factories(state)
        for entry in nested_values(state):
            if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id) and entry.data is not None:
                entry.data = self._copy((entry.key, tuple(entry.global_offset)), entry.data.detach())

    def _copy(self, key: tuple[str, tuple[int, ...]], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=HAS_CUDA)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def write_now(state: dict[str, Any], folder: Path) -> None:
    """Write a state as a checkpoint into an empty folder, without copies and digests; collective.

    Core's own synchronous save writes the same files. From 0.19 on it tells of an error nothing but its type.

    Raises:
        RuntimeError: it cannot be written; the operating system's error is in the text.
    """
    pending = _plan(state, folder, 0, validate=True)
    if HAS_CUDA:
        torch.cuda.synchronize()
    problems = []
    try:
        _write_files(pending)
    except Exception as error:  # noqa: BLE001 what a rank cannot do, all must hear of
        problems = [_reason(error)]
    if told := [text for of_rank in _gather(problems) for text in of_rank]:
        raise RuntimeError(told[0])
    _complete(pending)


def _plan(state: dict[str, Any], folder: Path, step: int, *, validate: bool) -> _Pending:
    """Have core plan which rank writes what of a state; collective."""
    # Core would start a process to hold one list of results; a queue of this process does.
    filesystem_async._results_queue = queue.Queue()
    arguments = inspect.signature(dist_checkpointing.save).parameters
    chosen = {"async_strategy": "mcore"} if "async_strategy" in arguments else {}
    request = dist_checkpointing.save(
        state, str(folder), async_sharded_save=True, validate_access_integrity=validate, **chosen
    )
    assert request is not None
    pending = _Pending(step, list(request.finalize_fns), filesystem_async._results_queue)
    if request.async_fn is not None:
        pending.buckets, pending.transforms = request.async_fn_args[1], request.async_fn.args[0]
    return pending


def _write(pending: _Pending) -> None:
    """Write the files of this rank and take their digests; the body of the thread."""
    try:
        _write_files(pending)
        pending.digests = {bucket[1]: digest(Path(bucket[0])) for bucket in pending.buckets}
    except Exception as error:  # noqa: BLE001 a thread has nobody to raise to
        pending.error = _reason(error)
    finally:
        pending.ended = time.monotonic()


def _write_files(pending: _Pending) -> None:
    """Write the files of this rank; raises what core's writer of a file gives back as an error."""
    write = partial(filesystem_async.FileSystemWriterAsync.write_preloaded_data, pending.transforms)
    for number, bucket in enumerate(pending.buckets):
        results: queue.Queue[Any] = queue.Queue()
        counts: queue.Queue[int] = queue.Queue()
        counts.put(number)
        write(local_proc_idx=number, write_bucket=bucket, results_queue=results, count_queue=counts, use_fsync=True)
        _, outcome = results.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        pending.written[number] = outcome


def _complete(pending: _Pending) -> None:
    """Write the index and the format file, from what the ranks wrote; collective."""
    if pending.written:
        pending.results.put(pending.written)
    for action in pending.finalize:
        action()


def _cannot_write(checkpoints: Path, step: int, reason: str) -> CheckpointError:
    try:
        free = f" ({shutil.disk_usage(checkpoints).free >> 20} MiB are free)"
    except OSError:
        free = ""
    return CheckpointError(
        f"{checkpoints}: the checkpoint of step {step} cannot be written: {reason}{free}; earlier ones are as they were"
    )


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; torch wraps the operating system's error in one of its own that does not say it."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    shown = inner or error
    return f"{type(shown).__name__}: {' '.join(str(shown).split())[:300]}"


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
