"""What every recipe shares: the run's folder, policy, optimizer, metrics and checkpoints, and how a run resumes."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch.distributed as dist

from megatron_rl.algorithms.metrics import Metric
from megatron_rl.checkpoint import reference_state, training_state
from megatron_rl.checkpoint.folders import SCORE, iteration_folder
from megatron_rl.checkpoint.hf_export import export_hf
from megatron_rl.checkpoint.resume import resume
from megatron_rl.checkpoint.training_state import POLICY, Trained
from megatron_rl.checkpoint.writer import CheckpointWriter
from megatron_rl.config.errors import Interrupted, UserError
from megatron_rl.config.load import save_config
from megatron_rl.config.numerics import row_multiple
from megatron_rl.config.schema import Config, GuardAction, KLReference, NonFinite
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.head import Extra
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.reference import ReferenceWeights, Teacher
from megatron_rl.engine.step import NON_FINITE_LOSSES, LossFunction, forward_backward
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.reductions import reduce_counts, reduce_metrics
from megatron_rl.placement.sizes import mfu
from megatron_rl.trainer.critic import build_critic
from megatron_rl.trainer.guards import GuardStop, RollBack, tripped
from megatron_rl.trainer.interruption import Interruption
from megatron_rl.trainer.metrics_log import MetricsLog
from megatron_rl.trainer.minibatch import MiniBatch
from megatron_rl.trainer.progress import Progress
from megatron_rl.trainer.rollout_log import truncate_rollouts_to_step
from megatron_rl.trainer.run_directory import RunDirectory
from megatron_rl.trainer.run_lock import lock
from megatron_rl.trainer.timing import PhaseTimer
from megatron_rl.trainer.watchdog import Watchdog


def build_reference(config: Config, policy: Policy) -> ReferenceWeights | Teacher:
    """The reference policy of a run that starts: its own first weights, or another checkpoint.

    Raises:
        UserError: the other checkpoint has another vocabulary.
    """
    path = config.algorithm.kl.reference_path
    if path is None:
        return ReferenceWeights(policy, is_average=config.algorithm.kl.reference is KLReference.moving_average)
    teacher = Policy(
        replace(config.model, hf_path=path, load_weights=True),
        policy.groups,
        config.parallel,
        trained=False,
    )
    sizes = [model.hf["vocab_size"] for model in (teacher, policy)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"algorithm.kl.reference_path: given a vocabulary of {sizes[0]}, allowed: {sizes[1]}, the policy's"
        )
    return Teacher(teacher)


class NonFiniteError(RuntimeError):
    """A loss or a gradient norm was nan or infinite, and the run is configured to stop there."""


@dataclass
class RunState:
    """Where a run stands; equal on all ranks, saved in checkpoints."""

    step: int = 0
    """Steps done. The policy's weight version is the same number."""
    data_position: int = 0
    """Training rows drawn."""
    adaptive: dict[str, Any] = field(default_factory=dict)
    """What an algorithm adapts from step to step, as plain values: a KL coefficient, a running baseline."""
    past: dict[str, list[float]] = field(default_factory=dict)
    """Recent values of the metrics that guards watch."""
    rollbacks: int = 0
    """Times that the run has gone back to a checkpoint because of its numbers."""


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
        self.timer = PhaseTimer()
        self._flops = 0  # of the step's updates, on all ranks
        self._lock = self._open_folder() if records else None
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
        saved = self._resume()
        if saved is not None:
            self.state = RunState(**saved)
        self.log = self._open_log() if self.is_main and records else None
        self.progress = Progress(
            config.train.num_steps,
            config.recipe.value,
            self.is_main and config.logging.progress,
            initial=self.state.step,
        )

    @property
    def _moving_reference(self) -> ReferenceWeights | None:
        """The reference policy, if it is part of the run's state."""
        fixed = self.config.algorithm.kl.reference is KLReference.fixed
        return self.reference if isinstance(self.reference, ReferenceWeights) and not fixed else None

    def _resume(self) -> dict[str, Any] | None:
        """Restore the latest whole checkpoint and return its run state; None if there is none. Collective."""
        saved = resume(self.run.checkpoints_dir, self.models, say=say)
        if saved is not None and self._moving_reference is not None:
            reference_state.load(self.run.checkpoints_dir, saved["step"], self._moving_reference)
        return saved

    def _open_folder(self) -> IO[str] | None:
        """Make the run's folder and take its lock; rank 0 does, and all ranks learn what keeps it from it."""
        held, problem = None, None
        if self.is_main:
            try:
                self.run.path.mkdir(parents=True, exist_ok=True)
                held = lock(self.run.path)
                self.run.create()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{self.run.path}: the run's folder cannot be written: {error}"
        told = [problem]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise UserError(told[0])
        return held

    def _start_watchdog(self) -> Watchdog:
        # Before a collective ends by its own limit, which says neither where nor for whom.
        wait_limit = 0.8 * 60 * self.config.parallel.distributed_timeout_minutes
        return Watchdog(self.config.watchdog, self.run, self.timer, rank=dist.get_rank(), wait_limit_s=wait_limit)

    def _open_log(self) -> MetricsLog:
        save_config(self.config, self.run.config_file)
        log = MetricsLog(
            self.run,
            tensorboard=self.config.logging.tensorboard,
            wandb_project=self.config.logging.wandb_project,
            name=self.config.name,
            config=asdict(self.config),
        )
        # A run that was killed wrote on after its checkpoint; those steps are made again. A run without a checkpoint
        # starts anew, and so does its record.
        last_step = self.state.step if self.state.step else -1
        log.truncate_to_step(last_step)
        truncate_rollouts_to_step(self.run, last_step)
        unwritten = iteration_folder(self.run.checkpoints_dir, self.state.step) / UNWRITTEN
        if unwritten.exists():
            log.take_back(unwritten.read_text())
        return log

    @property
    def is_done(self) -> bool:
        """All steps are made."""
        return self.state.step >= self.config.train.num_steps

    @property
    def pad_to_multiple(self) -> int:
        """Rows are this long or a multiple of it."""
        return row_multiple(self.config.model, self.config.parallel)

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
            num_rows_multiple=parallel.pipeline_model_parallel_size
            if parallel.virtual_pipeline_model_parallel_size
            else 1,
            together=together,
            cost=lambda length: self.policy.sizes.training_flops([length]),
        )

    def update(
        self, batch: MiniBatch, objective: LossFunction, *, temperature: float = 1.0, extras: Sequence[Extra] = ()
    ) -> dict[str, Metric]:
        """One optimizer step of the policy on a mini-batch: forward, backward, clip, step; see `forward_backward`.

        Raises:
            NonFiniteError: optimizer.on_non_finite is 'stop', and the loss or the gradient norm is not finite.
        """
        metrics = self._update(self.policy, self.optimizer, batch, objective, temperature, extras)
        if not self.groups.reports:
            return {}
        return metrics | {
            "data/packing_efficiency": Metric("mean", batch.packing_efficiency),
            "data/imbalance": Metric("max", batch.imbalance),
        }

    def update_critic(self, batch: MiniBatch, objective: LossFunction) -> dict[str, Metric]:
        """One optimizer step of the critic; see `update`. Its metrics are all called value/..."""
        assert self.critic is not None
        metrics = self._update(self.critic.model, self.critic.optimizer, batch, objective, 1.0)
        return {name.replace("optim/", "value/"): metric for name, metric in metrics.items()}

    def _update(
        self,
        model: Policy,
        optimizer: Optimizer,
        batch: MiniBatch,
        objective: LossFunction,
        temperature: float,
        extras: Sequence[Extra] = (),
    ) -> dict[str, Metric]:
        self._flops += model.sizes.training_flops(batch.lengths)
        optimizer.zero_grad()
        with model.routing.replaying():
            metrics = forward_backward(model, batch.rows, objective, temperature=temperature, extras=extras)
        bad_losses = metrics.pop(NON_FINITE_LOSSES).value if metrics else 0.0
        (bad_losses,) = reduce_counts([bad_losses], self.groups.world)
        guarded = bool(self.config.guards) and model is self.policy
        accepts = partial(self._accepts, metrics) if guarded else None
        update = optimizer.step(loss_is_finite=not bad_losses, accepts=accepts)
        if not update.finite:
            self._on_non_finite(update.grad_norm, bad_losses)
        if not self.groups.reports:
            return {}
        return metrics | {
            "optim/grad_norm": Metric("max", update.grad_norm if update.finite else math.nan),
            "optim/lr": Metric("max", update.lr),
            "optim/skipped_updates": Metric("sum", 0.0 if update.made else 1.0 / self.groups.dp.size()),
        }

    def _on_non_finite(self, grad_norm: float, bad_losses: float) -> None:
        what = f"the gradient norm is {grad_norm}, and the loss of {bad_losses:g} rows is not finite"
        if self.config.optimizer.on_non_finite is NonFinite.rollback:
            raise RollBack(what)
        if self.config.optimizer.on_non_finite is NonFinite.stop:
            raise NonFiniteError(
                f"step {self.state.step + 1}: {what}; nothing was updated. "
                "optimizer.on_non_finite=skip goes on without such updates"
            )

    def _accepts(self, metrics: dict[str, Metric], grad_norm: float) -> bool:
        """Whether the guards let an update pass; collective."""
        numbers = self.reduce(metrics if self.groups.reports else {}) | {"optim/grad_norm": grad_norm}
        trip = tripped(self.config.guards, numbers, self.state.past)
        if trip is None:
            return True
        action, reason = trip
        reason = f"step {self.state.step + 1}: {reason}"
        if action is GuardAction.rollback:
            raise RollBack(reason)
        if action is GuardAction.stop:
            raise GuardStop(f"{reason}; nothing was updated. The guard of this metric says stop")
        if self.is_main:
            say(f"{reason}; the update is skipped")
        return False

    def _roll_back(self, reason: RollBack) -> None:
        """Restore the last checkpoint, and go on with the data after those that led here; collective.

        Raises:
            GuardStop: there is no checkpoint, or this has happened too often.
        """
        step, position, count = self.state.step, self.state.data_position, self.state.rollbacks + 1
        self.checkpoints.finish()
        if count > self.config.train.max_rollbacks:
            raise GuardStop(f"{reason}; the run has gone back {count - 1} times, train.max_rollbacks")
        saved = self._resume()
        if saved is None:
            raise GuardStop(f"{reason}; there is no checkpoint to go back to")
        # In place: the recipe holds on to the state.
        for name, value in (saved | {"data_position": position, "rollbacks": count}).items():
            setattr(self.state, name, value)
        if self.log is not None:
            self.log.truncate_to_step(self.state.step)
            truncate_rollouts_to_step(self.run, self.state.step)
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
        self._flops = 0
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
            row["throughput/mfu"] = mfu(self._flops, row["timing_s/train"], dist.get_world_size(), peak)
        self.record(row)
        self.progress.update(1, **{name.split("/")[-1]: row[name] for name in _SHOWN if name in row})
        interval = self.config.checkpoint.save_interval
        told_to_stop = self._interruption.agreed()
        with self.timer.phase("save"):
            if self.is_done or told_to_stop or (interval and self.state.step % interval == 0):
                self.save(row)
            else:
                self.checkpoints.poll()
            if self.is_done or told_to_stop:
                self.checkpoints.finish()
        if told_to_stop and not self.is_done:
            raise Interrupted(f"{told_to_stop}: the state after step {self.state.step} is saved")

    def record(self, row: dict[str, float]) -> None:
        """Append a row at the present step to the metrics."""
        if self.log is not None:
            self.log.append(self.state.step, row)

    def save(self, row: Mapping[str, float]) -> None:
        """Write a checkpoint of the present step, whose metrics are `row`; collective."""
        if self.log is not None:
            self.log.position()  # the steps before a checkpoint are not made again: their rows must outlive it
        state = training_state.to_save(self.models, asdict(self.state))
        if self._moving_reference is not None:
            state |= reference_state.to_save(self._moving_reference)
        notes = self._score(row)
        if self.log is not None and self.log.unwritten:
            notes[UNWRITTEN] = self.log.unwritten
        self.checkpoints.save(self.state.step, state, notes=notes)

    def _score(self, row: Mapping[str, float]) -> dict[str, str]:
        metric = self.config.checkpoint.best_metric
        if metric is None:
            return {}
        name, sign = (metric[1:], -1.0) if metric.startswith("-") else (metric, 1.0)
        value = row.get(name, math.nan)
        return {SCORE: json.dumps({"metric": metric, "value": sign * value}) + "\n"} if math.isfinite(value) else {}

    def finish(self) -> None:
        """After the last step: export the policy."""
        if self.config.checkpoint.export_hf:
            export_hf(self.policy, self.run.hf_dir)

    def __enter__(self) -> Self:
        self._interruption = Interruption()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        self._interruption.close()
        self.checkpoints.abandon()
        if self.log is not None:
            self.log.close()
        if self.watchdog is not None:
            self.watchdog.close("done" if error is None else f"{type(error).__name__}: {error}")
        if self._lock is not None:
            self._lock.close()


def say(message: str) -> None:
    """A line about the run to its user."""
    print(f"megatron-rl: {message}", file=sys.stderr, flush=True)


UNWRITTEN = "unwritten_metrics.jsonl"
"""In a checkpoint: rows of metrics that the disk had no room for."""

_SHOWN = ("reward/mean", "sft/loss", "response/length_mean", "policy/entropy", "optim/grad_norm")
