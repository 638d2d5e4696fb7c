"""The verbs of the loop: generate, score, log_probs, advantages, train, sync_weights, report, evaluate."""

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor

from megatron_rl.algorithms.advantages import RunningBaseline
from megatron_rl.algorithms.metrics import Metric, combine
from megatron_rl.config.schema import Config, Dtype, KLEstimator
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.datasets import DataOrder, load_prompts, training_sequence
from megatron_rl.data.packing import NEW_VALUES, MicroBatch
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.engine.head import Extra
from megatron_rl.engine.optimizer import TrainingMemory
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.scalar_model import ActorCritic, Values
from megatron_rl.engine.step import forward_outputs
from megatron_rl.objectives.advantages import add_advantages, needs_critic, resolve_estimator
from megatron_rl.objectives.losses import resolve_policy_loss
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.objectives.objectives import PolicyGradientObjective, ValueObjective
from megatron_rl.objectives.penalties import KLPenalty, punish_length
from megatron_rl.parallel.groups import Groups
from megatron_rl.placement.layout import Layout
from megatron_rl.rewards.scoring import resolve_rewards
from megatron_rl.runs.logs import write_rollouts
from megatron_rl.runs.progress import say
from megatron_rl.sync.engines import place_engine
from megatron_rl.sync.weight_sync import WeightSync
from megatron_rl.trainer import evaluation
from megatron_rl.trainer.learned_reward import LearnedReward
from megatron_rl.trainer.rollouts import (
    Collection,
    RolloutWorker,
    draw_seeds,
    sample_metrics,
    sample_records,
    training_sampling,
)
from megatron_rl.trainer.training import Training
from megatron_rl.trainer.update import convergence_metrics

_MISMATCH = "mismatch/log_prob_abs_diff_mean"


class MismatchError(RuntimeError):
    """Rollout and training log-probs differ by more than the run allows."""


class RLTrainer:
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
        self.estimator = resolve_estimator(config.algorithm.advantage)
        self.policy_loss = resolve_policy_loss(config.algorithm.policy_loss)
        shared = config.algorithm.critic.shared
        self.values: list[Extra] = [Values()] if shared else []
        self.training = Training(
            config,
            groups,
            num_updates_per_step=self.num_updates,
            build=ActorCritic if shared else Policy,
            with_critic=needs_critic(self.estimator) and not shared,
            with_reference=bool(config.algorithm.kl.coefficient) or "ref_log_probs" in self.policy_loss.wants,
            records=records,
        )
        self.kl = KLPenalty(config.algorithm.kl, self.training.reference, self.training.state)
        self.learned_reward = LearnedReward(config, groups, tokenizer) if config.rewards.model.hf_path else None
        self.sampling = training_sampling(rollout.sampling)
        offloads = rollout.offload_training
        self._memory = [TrainingMemory(m.optimizer) for m in self.training.models.values()] if offloads else []
        for memory in self._memory:  # an engine starts only where its memory is free
            memory.free()
        meeting = self.training.meeting
        engine = place_engine(config, layout, groups, meeting)
        self.worker = RolloutWorker(engine, rewards, layout, groups, meeting, config=config.rewards)
        self._sync = WeightSync(
            self.training.policy,
            engine,
            layout,
            self.prompts,
            config.sync,
            quantization=rollout.quantization,
            pad_to_multiple=self.training.pad_to_multiple,
            meeting=meeting,
        )
        self._compared = False
        self.training.after_rollback = self.sync_weights
        self.worker.bring_back = lambda: self._sync(self._sync.version)

    @property
    def on_policy(self) -> bool:
        """One update per rollout: the policy that is updated is the one that sampled, so its ratio is exactly 1."""
        return self.num_updates == 1

    def sync_weights(self, version: int | None = None) -> dict[str, float]:
        """Send the policy to the engines, under the number of steps that made it."""
        for memory in self._memory:
            memory.free()
        self.worker.engine.wake_up()
        return self._sync(self.training.state.step if version is None else version)

    def collection(self) -> Collection:
        """An empty batch for this step's samples."""
        dynamic, evaluation = self.config.algorithm.dynamic_sampling, self.config.evaluation
        term = dynamic.reward or evaluation.correct_reward
        return Collection(self.config.rollout.num_prompts_per_step, dynamic.max_rounds, term)

    def generate(self, count: int) -> tuple[list[Prompt], list[list[Completion]]]:
        """Draw `count` prompts and complete this engine's share of them."""
        state = self.training.state
        prompts = [self.prompts[row] for row in self.order.rows(state.data_position, count)]
        seeds = draw_seeds(self.config.seed, state.data_position, count)
        state.data_position += count
        completions = self.worker.generate(
            prompts, seeds, self.sampling, self.config.rollout.num_samples_per_prompt, self.training.progress
        )
        return prompts, completions

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Sample]]:
        """Reward this engine's completions; every rank gets the samples of all, by prompt."""
        by_prompt = self.worker.score(prompts, completions)
        samples = [sample for of_prompt in by_prompt for sample in of_prompt]
        samples = punish_length(samples, self.config.rewards.overlong, max_tokens=self.sampling.max_response_tokens)
        if self.learned_reward is not None:
            samples = self.learned_reward(samples, self.training)
        scored = iter(samples)
        return [[next(scored) for _ in of_prompt] for of_prompt in by_prompt]

    def log_probs(self, samples: Sequence[Sample]) -> list[MiniBatch]:
        """Lay out the mini-batches and add the log-probs of the old and the reference policy, and the critic's values.

        The old policy's are skipped where they are those of the first and only update, bit for bit.
        """
        self.worker.engine.sleep()
        for memory in self._memory:
            memory.take_back()
        sequences = [training_sequence(sample) for sample in samples]
        size = self.samples_per_update
        batches = [
            self.training.minibatch(sequences, range(start, start + size)) for start in range(0, len(sequences), size)
        ]
        micro_batches = _micro_batches(batches)
        policy, recorded = self.training.policy, self.config.rollout.record_routes
        if recorded:
            policy.routing.take(micro_batches, [routes for s in samples if (routes := s.completion.routes) is not None])
        is_exact = self.config.algorithm.kl.estimator is KLEstimator.exact
        if not self.on_policy or self.kl.in_reward or self.values or is_exact:
            with policy.routing.replaying() if recorded else policy.routing.recording():
                outputs = forward_outputs(
                    policy, micro_batches, temperature=self.sampling.temperature, extras=self.values
                )
            for micro_batch, of_micro_batch in zip(micro_batches, outputs, strict=True):
                micro_batch.per_token["old_log_probs"] = of_micro_batch["log_probs"]
                if NEW_VALUES in of_micro_batch:
                    micro_batch.per_token["values"] = of_micro_batch[NEW_VALUES]
        self.kl.add_log_probs(micro_batches, policy=policy, temperature=self.sampling.temperature)
        if self.training.critic is not None:
            self.training.critic.add_values(micro_batches)
        return batches

    def advantages(self, samples: Sequence[Sample], batches: Sequence[MiniBatch]) -> Tensor:
        """Advantages of the micro-batches' tokens, and of the completions, [samples]; see `advantages`."""
        settings, adaptive = self.config.algorithm.advantage, self.training.state.adaptive
        micro_batches = _micro_batches(batches)
        self.kl.penalise(micro_batches)
        baseline = RunningBaseline(**adaptive.get("baseline", {}))
        advantages = add_advantages(
            samples,
            micro_batches,
            config=settings,
            estimator=self.estimator,
            baseline=baseline,
            dp=self.training.groups.dp,
        )
        rewards = sum(sample.reward for sample in samples)
        if "baseline" in self.estimator.wants:
            adaptive["baseline"] = asdict(baseline.after(rewards, len(samples), decay=settings.baseline_decay))
        return advantages

    def train(self, batches: Sequence[MiniBatch]) -> dict[str, float]:
        """One optimizer step per mini-batch and epoch, of the critic if there is one and of the policy."""
        metrics: dict[str, Metric] = {}
        algorithm, training = self.config.algorithm, self.training
        norm = algorithm.token_sum_norm or float(self.sampling.max_response_tokens)
        warming_up = training.critic is not None and training.state.step < algorithm.critic.warmup_steps
        for batch in [batch for _ in range(self.config.train.num_epochs_per_step) for batch in batches]:
            if training.critic is not None:
                metrics = combine(metrics, training.update_critic(batch, ValueObjective(algorithm, batch.counts, norm)))
            if not warming_up:
                objective = PolicyGradientObjective(
                    algorithm,
                    batch.counts,
                    norm,
                    policy_loss=self.policy_loss,
                    on_policy=self.on_policy,
                    kl_coefficient=self.kl.coefficient,
                    reference=self.kl.logits,
                )
                update = training.update(
                    batch,
                    objective,
                    temperature=self.sampling.temperature,
                    extras=self.values,
                )
                metrics = combine(metrics, update)
        found = training.reduce(metrics)
        if not warming_up:
            check_mismatch(found, mismatch_limit(self.config, first=not self._compared))
            self._compared = True
        found |= self.kl.after_step(found, len(batches) * self.samples_per_update)
        return found | convergence_metrics(found, self.config.logging.convergence, training.state)

    def report(self, samples: Sequence[Sample], advantages: Tensor) -> dict[str, float]:
        """Metrics of the step's samples; a few of them are written to the run's folder."""
        done = self.training.state.step
        if self.training.is_main:
            count = self.config.logging.num_logged_rollouts
            records = sample_records(samples, advantages, step=done + 1, count=count)
            try:
                write_rollouts(self.training.run, done + 1, records)
            except OSError as error:  # a full disk costs these samples' record, not the run
                say(f"rollouts of step {done + 1} cannot be written: {error}")
        return sample_metrics(samples, version=done)

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
            "the engines' log-probs are too far from the policy's to train on. Compare rotary parameters, tied "
            "weights and dtype in config.json with what the engine reads, and the sync of weights; "
            "a larger rollout.max_mismatch goes on"
        )


_FIRST_STEP = {Dtype.float32: 0.01, Dtype.bfloat16: 0.2}
"""Nats. Rounding makes about 1e-5 in float32 and 0.01 to 0.05 in bfloat16; another model, 0.3 and more."""
_FIRST_STEP_QUANTIZED = 0.5


def mismatch_limit(config: Config, *, first: bool) -> float | None:
    """`rollout.max_mismatch`; without one, a generous limit by dtype for the first step, whose weights are equal."""
    limit = config.rollout.max_mismatch
    if limit is not None or not first:
        return limit
    return _FIRST_STEP_QUANTIZED if config.rollout.quantization else _FIRST_STEP[config.model.params_dtype]


def _micro_batches(batches: Sequence[MiniBatch]) -> list[MicroBatch]:
    return [micro_batch for batch in batches for micro_batch in batch.micro_batches]
