"""The verbs of the loop: what each does to the samples of a step."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.advantages import group_relative_advantages
from megatron_rl.algorithms.kl import kl_estimate
from megatron_rl.algorithms.metrics import Metric, combine
from megatron_rl.config.schema import Config, KLPlace
from megatron_rl.data.datasets import load_prompts, training_sequence
from megatron_rl.data.order import DataOrder
from megatron_rl.data.packing import PackedRow, unpack
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.engine.step import forward_log_probs
from megatron_rl.parallel.groups import Groups
from megatron_rl.placement.layout import Layout
from megatron_rl.rewards.registry import resolve_rewards
from megatron_rl.trainer import evaluation
from megatron_rl.trainer.minibatch import MiniBatch, spread
from megatron_rl.trainer.objectives import PolicyGradientObjective
from megatron_rl.trainer.rollout_log import write_rollouts
from megatron_rl.trainer.rollouts import RolloutWorker, build_engine, draw_seeds, training_sampling
from megatron_rl.trainer.sync import WeightSync
from megatron_rl.trainer.tokenizer import load_tokenizer
from megatron_rl.trainer.training import Training

_MISMATCH = "mismatch/log_prob_abs_diff_mean"


class MismatchError(RuntimeError):
    """Rollout and training log-probs differ by more than the run allows."""


class Reinforcement:
    """A reinforcement-learning run in progress on this rank. The loop calls its methods in order."""

    def __init__(self, config: Config, groups: Groups, layout: Layout, *, records: bool = True) -> None:
        """Load prompts and rewards, build or resume the policy, start the engine.

        Args:
            config: validated.
            groups: this rank's.
            layout: of the training ranks and the engines.
            records: see `Training`.

        Raises:
            UserError: anything that the user gave cannot be used.
        """
        rollout = config.rollout
        tokenizer = load_tokenizer(config.model.hf_path)
        limit = config.data.max_prompt_tokens
        self.config = config
        self.prompts = load_prompts(str(config.data.train), config.data, tokenizer, max_prompt_tokens=limit)
        self.held_out = (
            load_prompts(config.data.eval, config.data, tokenizer, max_prompt_tokens=limit) if config.data.eval else []
        )
        rewards = resolve_rewards(config.rewards)
        self.order = DataOrder(len(self.prompts), config.seed, config.data.shuffle)
        num_samples = rollout.num_prompts_per_step * rollout.num_samples_per_prompt
        self.samples_per_update = config.train.global_batch_size or num_samples
        self.num_updates = num_samples // self.samples_per_update * config.train.num_epochs_per_step
        self.training = Training(config, groups, num_updates_per_step=self.num_updates, records=records)
        self.sampling = training_sampling(rollout.sampling)
        engine = build_engine(
            rollout,
            model_path=config.model.hf_path,
            dtype=config.model.params_dtype.value,
            max_model_len=rollout.max_model_len or limit + rollout.sampling.max_response_tokens,
            seed=config.seed,
        )
        self.worker = RolloutWorker(engine, rewards, layout, groups)
        self._sync = WeightSync(self.training, engine, self.prompts)

    @property
    def on_policy(self) -> bool:
        """One update per rollout: the policy that is updated is the one that sampled, so its ratio is exactly 1."""
        return self.num_updates == 1

    def sync_weights(self, version: int | None = None) -> dict[str, float]:
        """Send the policy to the engines, under the number of steps that made it."""
        self.worker.engine.wake_up()
        return self._sync(self.training.state.step if version is None else version)

    def generate(self) -> tuple[list[Prompt], list[list[Completion]]]:
        """Draw the step's prompts and complete this engine's share of them."""
        count, position = self.config.rollout.num_prompts_per_step, self.training.state.data_position
        prompts = [self.prompts[row] for row in self.order.rows(position, count)]
        seeds = draw_seeds(self.config.seed, position, count)
        completions = self.worker.generate(
            prompts, seeds, self.sampling, self.config.rollout.num_samples_per_prompt, self.training.progress
        )
        self.worker.engine.sleep()
        return prompts, completions

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[Sample]:
        """Reward this engine's completions; every rank gets the samples of all."""
        return [sample for of_prompt in self.worker.score(prompts, completions) for sample in of_prompt]

    def log_probs(self, samples: Sequence[Sample]) -> list[MiniBatch]:
        """Lay out the mini-batches and add to their rows the log-probs of the old and the reference policy.

        The old policy's are skipped where they are those of the first and only update, bit for bit.
        """
        sequences = [training_sequence(sample) for sample in samples]
        size = self.samples_per_update
        batches = [
            self.training.minibatch(sequences, range(start, start + size)) for start in range(0, len(sequences), size)
        ]
        rows = [row for batch in batches for row in batch.rows]
        in_reward = self.training.reference is not None and self.config.algorithm.kl.place is KLPlace.reward
        if not self.on_policy or in_reward:
            self._add_log_probs(rows, "old_log_probs")
        if self.training.reference is not None:
            with self.training.reference.swapped_in():
                self._add_log_probs(rows, "ref_log_probs")
        return batches

    def _add_log_probs(self, rows: Sequence[PackedRow], name: str) -> None:
        outputs = forward_log_probs(self.training.policy, rows, temperature=self.sampling.temperature)
        for row, (log_probs, _) in zip(rows, outputs, strict=True):
            row.per_token[name] = log_probs

    def advantages(self, samples: Sequence[Sample], batches: Sequence[MiniBatch]) -> Tensor:
        """Compare each reward with its group's, and spread the result over the tokens of the rows; [samples]."""
        settings = self.config.algorithm
        rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float32)
        if self.training.reference is not None and settings.kl.place is KLPlace.reward:
            rewards -= settings.kl.coefficient * self._sequence_kl(batches, len(samples))
        advantages = group_relative_advantages(
            rewards,
            torch.tensor([sample.prompt.prompt_id for sample in samples]),
            normalize_by_std=settings.advantage.normalize_by_std,
            std_epsilon=settings.advantage.std_epsilon,
        )
        values = advantages.tolist()
        for batch in batches:
            for row in batch.rows:
                row.per_token["advantages"] = spread(row, values)
        return advantages

    def _sequence_kl(self, batches: Sequence[MiniBatch], num_samples: int) -> Tensor:
        """[samples]: estimated KL(old policy || reference) summed over each completion's tokens, from all ranks."""
        mine: dict[int, float] = {}
        for row in (row for batch in batches for row in batch.rows):
            old, reference = row.per_token["old_log_probs"], row.per_token["ref_log_probs"]
            kl = kl_estimate(old, reference, self.config.algorithm.kl.estimator.value)
            kept = torch.where(row.loss_mask > 0, kl, 0.0)
            mine |= {i: float(part.sum()) for i, part in zip(row.sequence_ids, unpack(kept, row), strict=True)}
        dp = self.training.groups.dp
        gathered: list[dict[int, float]] = [{} for _ in range(dp.size())]
        dist.all_gather_object(gathered, mine, group=dp)
        everyone = {i: kl for of_rank in gathered for i, kl in of_rank.items()}
        return torch.tensor([everyone[i] for i in range(num_samples)])

    def train(self, batches: Sequence[MiniBatch]) -> dict[str, float]:
        """One optimizer step per mini-batch and epoch."""
        metrics: dict[str, Metric] = {}
        norm = self.config.algorithm.token_sum_norm or float(self.sampling.max_response_tokens)
        for _ in range(self.config.train.num_epochs_per_step):
            for batch in batches:
                objective = PolicyGradientObjective(self.config.algorithm, batch.counts, norm, on_policy=self.on_policy)
                update = self.training.update(batch, objective, temperature=self.sampling.temperature)
                metrics = combine(metrics, update)
        row = self.training.reduce(metrics)
        check_mismatch(row, self.config.rollout.max_mismatch)
        return row

    def report(self, samples: Sequence[Sample], advantages: Tensor) -> dict[str, float]:
        """Metrics of the step's samples; a few of them are written to the run's folder."""
        rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
        lengths = torch.tensor([len(sample.completion.token_ids) for sample in samples], dtype=torch.float64)
        truncated = [sample.completion.finish_reason == "length" for sample in samples]
        ages = [self.training.state.step - sample.completion.weight_version for sample in samples]
        if self.training.is_main:
            every = max(1, len(samples) // max(1, self.config.logging.num_logged_rollouts))
            chosen = range(0, len(samples), every)[: self.config.logging.num_logged_rollouts]
            step = self.training.state.step + 1
            records = [_record(samples[i], float(advantages[i]), step) for i in chosen]
            write_rollouts(self.training.run, step, records)
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std(correction=0)),
            "reward/min": float(rewards.min()),
            "reward/max": float(rewards.max()),
            **_reward_terms(samples),
            "response/length_mean": float(lengths.mean()),
            "response/truncated_fraction": sum(truncated) / len(truncated),
            "staleness/mean": sum(ages) / len(ages),
            "staleness/max": max(ages),
            "throughput/tokens": float(lengths.sum()) + sum(len(sample.prompt.token_ids) for sample in samples),
        }

    def evaluation_is_due(self) -> bool:
        """Whether the step that is ending is one to evaluate after."""
        done, interval = self.training.state.step + 1, self.config.evaluation.interval
        return done == self.config.train.num_steps or bool(interval and done % interval == 0)

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the engine's present weights; {} without held-out data."""
        if not self.held_out:
            return {}
        with self.training.timer.phase("evaluate"):
            metrics, _ = evaluation.evaluate(self.config, self.worker, self.held_out, self.training.progress)
        return metrics


def check_mismatch(row: dict[str, float], limit: float | None) -> None:
    """Raise MismatchError if engines and policy disagreed by more than `rollout.max_mismatch`, or by nan."""
    if limit is not None and not row[_MISMATCH] <= limit:
        raise MismatchError(
            f"{_MISMATCH} is {row[_MISMATCH]:.3g} nats, rollout.max_mismatch is {limit:g}: "
            "the engines' log-probs are too far from the policy's to train on"
        )


def _reward_terms(samples: Sequence[Sample]) -> dict[str, float]:
    names = samples[0].reward_terms
    return {f"reward/{name}": sum(sample.reward_terms[name] for sample in samples) / len(samples) for name in names}


def _record(sample: Sample, advantage: float, step: int) -> dict[str, Any]:
    prompt, completion = sample.prompt, sample.completion
    return {
        "step": step,
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "prompt": prompt.text,
        "completion": completion.text,
        "answer": prompt.answer,
        "reward": sample.reward,
        "reward_terms": sample.reward_terms,
        "advantage": advantage,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "weight_version": completion.weight_version,
    }
