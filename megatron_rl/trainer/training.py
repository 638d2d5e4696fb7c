"""What every recipe shares: the run's folder, policy, optimizer, metrics and checkpoints, and how a run resumes."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from megatron_rl.algorithms.metrics import Metric
from megatron_rl.checkpoint import training_state
from megatron_rl.checkpoint.hf_export import export_hf
from megatron_rl.checkpoint.training_state import POLICY, Trained, resume
from megatron_rl.checkpoint.writer import CheckpointWriter
from megatron_rl.config.errors import Interrupted
from megatron_rl.config.numerics import token_multiple
from megatron_rl.config.schema import Config
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.head import Extra
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.reference import build_reference, moving
from megatron_rl.engine.scalar_model import build_critic
from megatron_rl.engine.step import LossFunction
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.parallel.groups import Groups, reduce_metrics
from megatron_rl.parallel.meeting import Meeting
from megatron_rl.placement.sizes import mfu
from megatron_rl.runs.continuation import file_identity
from megatron_rl.runs.directory import RunDirectory
from megatron_rl.runs.interruption import Interruption, JobClock, job_end, tell_saved
from megatron_rl.runs.progress import PhaseTimer, Progress, say
from megatron_rl.runs.record import Record, RunState, open_folder
from megatron_rl.runs.watchdog import Watchdog
from megatron_rl.trainer.update import GuardStop, RollBack, Updates


class Training:
    """A run in progress on this rank; a context that closes its record, also when the run fails."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        *,
        num_updates_per_step: int,
        build: Callable[..., Policy] = Policy,
        with_critic: bool = False,
        with_reference: bool = False,
        records: bool = True,
    ) -> None:
        """Build or resume the run of `config`.

        Args:
            config: validated.
            groups: this rank's.
            num_updates_per_step: optimizer steps of a step.
            build: the model that is trained; a reward model is another one than a policy.
            with_critic: a critic is trained beside it.
            with_reference: a reference policy is kept, to compare with.
            records: False leaves the run's folder as it is, which another process may be writing.

        Raises:
            UserError: the model or the latest checkpoint cannot be read.
        """
        self.config, self.groups = config, groups
        self.run = RunDirectory(Path(config.output_dir) / config.name)
        self.is_main = dist.get_rank() == 0
        self.state = RunState()
        self._updates = Updates(config, groups, self.state)
        self.timer = PhaseTimer()
        self.meeting = Meeting.of_world(
            f"run {next(_RUNS_OF_PROCESS)}",
            limit_seconds=60 * config.parallel.distributed_timeout_minutes,
            on_progress=self.timer.progressed,
        )
        self._lock = open_folder(self.run, config) if records else None
        self.watchdog = self._start_watchdog() if records else None
        num_steps = config.train.num_steps * num_updates_per_step
        self.policy = build(
            config.model,
            groups,
            config.parallel,
            use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
            optimizer=config.optimizer.implementation,
        )
        if self.is_main and records:
            print(self.policy.choices, flush=True)
        self.reference = build_reference(config, self.policy) if with_reference else None
        self._moving_reference = moving(config, self.reference)
        self.optimizer = Optimizer(config.optimizer, self.policy, num_steps=num_steps)
        self.critic = build_critic(config, groups, num_steps=num_steps) if with_critic else None
        self.after_rollback: Callable[[], object] = lambda: None
        """Called when the weights have gone back to those of a checkpoint."""
        self.models = {POLICY: Trained(self.policy, self.optimizer)}
        if self.critic is not None:
            self.models["critic"] = Trained(self.critic.model, self.critic.optimizer)
        self.checkpoints = CheckpointWriter(
            self.run.checkpoints_dir,
            asynchronous=config.checkpoint.asynchronous,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )
        self.checkpoints.on_published = tell_saved
        self._resume()
        self._record = Record(self.run, config, self.state.step) if self.is_main and records else None
        self.progress = Progress(
            config.train.num_steps,
            config.recipe.value,
            self.is_main and config.logging.progress,
            initial=self.state.step,
        )

    def _resume(self) -> bool:
        """Restore the latest whole checkpoint, if there is one; collective."""
        saved = resume(self.run.checkpoints_dir, self.models, say=say)
        if saved is None:
            self.state.data_identity = file_identity(self.config.data.train)
            return False
        if self._moving_reference is not None:
            training_state.load_reference(self.run.checkpoints_dir, saved["step"], self._moving_reference)
        for name, value in saved.items():  # in place: others hold the state
            setattr(self.state, name, value)
        identity = file_identity(self.config.data.train)
        if self.state.data_identity not in ("", identity) and self.is_main:
            say(
                f"{self.config.data.train}: other data than before; the run keeps its place, {self.state.data_position}"
            )
        self.state.data_identity = identity
        return True

    def _start_watchdog(self) -> Watchdog:
        # Before a collective ends by its own limit, which says neither where nor for whom.
        wait_limit = 0.8 * 60 * self.config.parallel.distributed_timeout_minutes
        return Watchdog(self.config.watchdog, self.run, self.timer, rank=dist.get_rank(), wait_limit_s=wait_limit)

    @property
    def is_done(self) -> bool:
        """All steps are made."""
        return self.state.step >= self.config.train.num_steps

    @property
    def pad_to_multiple(self) -> int:
        """Micro-batches are this long or a multiple of it."""
        return token_multiple(self.config.model, self.config.parallel)

    def minibatch(
        self, sequences: Sequence[TrainingSequence], indices: Sequence[int], *, together: int = 1
    ) -> MiniBatch:
        """Lay out one optimizer step; see `MiniBatch.of`."""
        parallel = self.config.parallel
        return MiniBatch.of(
            sequences,
            indices,
            self.groups,
            micro_batch_tokens=self.config.train.micro_batch_tokens,
            pad_to_multiple=self.pad_to_multiple,
            num_micro_batches_multiple=parallel.pipeline_model_parallel_size
            if parallel.virtual_pipeline_model_parallel_size
            else 1,
            together=together,
            cost=lambda length: self.policy.sizes.training_flops([length]),
        )

    def update(
        self, batch: MiniBatch, objective: LossFunction, *, temperature: float = 1.0, extras: Sequence[Extra] = ()
    ) -> dict[str, Metric]:
        """One optimizer step of the policy on a mini-batch, under the guards; see `Updates.make`."""
        metrics = self._updates.make(
            self.policy, self.optimizer, batch, objective, temperature=temperature, extras=extras, guarded=True
        )
        if not self.groups.reports:
            return {}
        return metrics | {
            "data/packing_efficiency": Metric("mean", batch.packing_efficiency),
            "data/imbalance": Metric("max", batch.imbalance),
        }

    def update_critic(self, batch: MiniBatch, objective: LossFunction) -> dict[str, Metric]:
        """One optimizer step of the critic; see `update`. Its metrics are all called value/..."""
        assert self.critic is not None
        metrics = self._updates.make(self.critic.model, self.critic.optimizer, batch, objective)
        return {name.replace("optim/", "value/"): metric for name, metric in metrics.items()}

    def _roll_back(self, reason: RollBack) -> None:
        """Restore the last checkpoint, and go on with the data after those that led here; collective.

        Raises:
            GuardStop: there is no checkpoint, or this has happened too often.
        """
        step, position, count = self.state.step, self.state.data_position, self.state.rollbacks + 1
        self.checkpoints.finish()
        if count > self.config.train.max_rollbacks:
            raise GuardStop(f"{reason}; the run has gone back {count - 1} times, train.max_rollbacks")
        if not self._resume():
            raise GuardStop(f"{reason}; there is no checkpoint to go back to")
        self.state.data_position, self.state.rollbacks = position, count
        if self._record is not None:
            self._record.go_back(self.state.step)
        if self.is_main:
            say(f"{reason}; back at step {self.state.step}, on with later data")
        self.progress.update(self.state.step - step)
        self.after_rollback()

    def reduce(self, metrics: dict[str, Metric]) -> dict[str, float]:
        """Metrics of all ranks as numbers; collective."""
        return reduce_metrics(metrics, self.groups.world)

    @contextmanager
    def step(self) -> Iterator[dict[str, float]]:
        """One step of the run: yields the dictionary of its metrics, which is logged when the context ends.

        A metric `throughput/tokens`, the tokens of the step, is completed by the rates.
        """
        self.timer.pop()
        self._job.start_step()
        self._updates.flops = 0
        if self.watchdog is not None:
            self.watchdog.step = self.state.step + 1
        row: dict[str, float] = {}
        try:
            yield row
        except RollBack as reason:
            self._roll_back(reason)
            return
        if self.state.rollbacks:
            row["guards/rollbacks"] = float(self.state.rollbacks)
        self.state.step += 1
        row |= self.timer.pop()
        if "throughput/tokens" in row:
            rate = row["throughput/tokens"] / row["timing_s/step"]
            row["throughput/tokens_per_second"] = rate
            row["throughput/tokens_per_second_per_gpu"] = rate / dist.get_world_size()
        peak = self.config.logging.peak_tflops_per_gpu
        if peak is not None and row.get("timing_s/train"):
            row["throughput/mfu"] = mfu(self._updates.flops, row["timing_s/train"], dist.get_world_size(), peak)
        self.record(row)
        self.progress.update(1, **{name.split("/")[-1]: row[name] for name in _SHOWN if name in row})
        self._job.end_step()
        # The clock of rank 0 alone: those of several machines differ, and each rank would ask Slurm.
        decision = self._interruption.agreed(
            stop=self._job.out_of_time(self.checkpoints.longest_seconds) if self.is_main else None,
            save=self.is_main and self._job.save_is_due,
        )
        interval = self.config.checkpoint.save_interval
        is_last = self.is_done or decision.stop is not None
        with self.timer.phase("save"):
            if is_last or decision.save or (interval and self.state.step % interval == 0):
                self.save(row)
            else:
                self.checkpoints.poll()
            if is_last:
                self.checkpoints.finish()
        if decision.stop is not None and not self.is_done:
            raise Interrupted(f"{decision.stop}: the state after step {self.state.step} is saved")

    def record(self, row: dict[str, float]) -> None:
        """Append a row at the present step to the metrics."""
        if self._record is not None:
            self._record.append(self.state.step, row)

    def save(self, row: Mapping[str, float]) -> None:
        """Write a checkpoint of the present step, whose metrics are `row`; collective."""
        notes = self._record.notes(row) if self._record is not None else {}
        state = training_state.to_save(self.models, asdict(self.state))
        if self._moving_reference is not None:
            state |= training_state.reference_to_save(self._moving_reference)
        self._job.start_save()
        self.checkpoints.save(self.state.step, state, notes=notes)

    def finish(self) -> None:
        """After the last step: export the policy."""
        if self.config.checkpoint.export_hf:
            export_hf(self.policy, self.run.hf_dir)

    def __enter__(self) -> Self:
        self._interruption = Interruption()
        end = job_end if self.is_main else lambda: None
        self._job = JobClock(end, save_minutes=self.config.checkpoint.save_minutes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        self._interruption.close()
        self.checkpoints.abandon()
        if self._record is not None:
            self._record.close()
        if self.watchdog is not None:
            self.watchdog.close("done" if error is None else f"{type(error).__name__}: {error}")
        if self._lock is not None:
            self._lock.close()


_RUNS_OF_PROCESS = itertools.count()
"""A world may train several runs, one after another, on all its ranks."""

_SHOWN = ("reward/mean", "sft/loss", "response/length_mean", "policy/entropy", "optim/grad_norm")
