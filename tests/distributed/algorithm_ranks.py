"""One update's loss and gradient of every objective, on recorded sequences, as a spawned rank computes them."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.algorithms.advantages import RunningBaseline
from megatron_rl.config.schema import (
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    CorrectionLevel,
    CorrectionMethod,
    CriticConfig,
    Divergence,
    Dtype,
    KLConfig,
    KLEstimator,
    ModelConfig,
    OptimizerConfig,
    PolicyLossConfig,
    PreferenceConfig,
    SupervisedConfig,
    Whitening,
)
from megatron_rl.data.datasets import training_sequence
from megatron_rl.data.preferences import LabelledCompletion
from megatron_rl.data.samples import Completion, Prompt, Sample, TrainingSequence
from megatron_rl.engine.head import Extra
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.reference import ReferenceLogits, Teacher, reference_logits
from megatron_rl.engine.scalar_model import ActorCritic, ScalarModel, Values
from megatron_rl.engine.step import LossFunction, forward_backward
from megatron_rl.objectives.advantages import ESTIMATORS, add_advantages, gathered_means, resolve_estimator
from megatron_rl.objectives.losses import (
    POLICY_LOSSES,
    REWARD_LOSSES,
    resolve_policy_loss,
    resolve_preference_loss,
    resolve_supervised_loss,
)
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.objectives.objectives import PolicyGradientObjective, SupervisedObjective, ValueObjective
from megatron_rl.objectives.preference_objectives import PreferenceObjective, RewardObjective
from megatron_rl.parallel.groups import reduce_metrics
from tests.distributed.training_ranks import parallel_of, recorded_rollouts, start_policy

Results = dict[str, dict[str, float]]
NORM = 16.0


def _policy_gradients() -> dict[str, AlgorithmConfig]:
    """Every policy loss, with different choices of the rest."""

    def loss(name: str, bound: float) -> PolicyLossConfig:
        return PolicyLossConfig(name=name, clip_low=bound, clip_high=bound)

    def correction(method: CorrectionMethod, level: CorrectionLevel) -> CorrectionConfig:
        return CorrectionConfig(method=method, level=level, low=0.2, high=5.0)

    truncated = correction(CorrectionMethod.truncate, CorrectionLevel.token)
    masked = correction(CorrectionMethod.mask, CorrectionLevel.geometric)
    weighted = KLConfig(coefficient=0.1, estimator=KLEstimator.k3, weighted=True)
    sums, means = Aggregation.sequence_mean_token_sum, Aggregation.sequence_mean_token_mean
    return {
        "ppo_clip": AlgorithmConfig(policy_loss=loss("ppo_clip", 0.5), kl=weighted, entropy_coefficient=0.01),
        "ppo_trajectory": AlgorithmConfig(policy_loss=loss("ppo_trajectory", 1.0), aggregation=means),
        "gspo": AlgorithmConfig(policy_loss=loss("gspo", 0.9), aggregation=means),
        "gspo_token": AlgorithmConfig(policy_loss=loss("gspo_token", 0.9), correction=masked),
        "cispo": AlgorithmConfig(policy_loss=loss("cispo", 0.9), correction=truncated),
        "importance_weighted": AlgorithmConfig(
            policy_loss=loss("importance_weighted", 0.2), aggregation=Aggregation.token_sum_norm
        ),
        "reinforce": AlgorithmConfig(policy_loss=loss("reinforce", 0.2), aggregation=sums),
    }


PREFERENCES = {
    "dpo": PreferenceConfig(loss="dpo", label_smoothing=0.1, sft_coefficient=0.5),
    "ipo": PreferenceConfig(loss="ipo", beta=0.5, length_normalized=True),
    "hinge": PreferenceConfig(loss="hinge", beta=0.1),
    "simpo": PreferenceConfig(loss="simpo", beta=2.0, args={"gamma": 0.5}),
    "orpo": PreferenceConfig(loss="orpo", args={"odds_coefficient": 0.1}),
    "kto": PreferenceConfig(loss="kto"),
}
REWARDS = {name: PreferenceConfig(loss=name) for name in ("bradley_terry", "regression", "process")}


def recorded_preferences(num_pairs: int = 7) -> list[list[LabelledCompletion]]:
    """Pairs of uneven length; of each completion the first and the fourth token end a step, if it has them."""
    rng = np.random.default_rng(11)
    pairs = []
    for _ in range(num_pairs):
        prompt = tuple(rng.integers(3, 259, size=int(rng.integers(1, 6))).tolist())
        pair = []
        for label in (1.0, 0.0):
            completion = tuple(rng.integers(3, 259, size=int(rng.integers(1, 12))).tolist())
            ends = tuple(i for i in (0, 3) if i < len(completion))
            pair.append(LabelledCompletion(prompt, completion, label, ends, tuple(float(i == 0) for i in ends)))
        pairs.append(pair)
    return pairs


SMOOTHING, SHARED_COEFFICIENT, KL_COEFFICIENT = 0.1, 0.7, 0.3
"""Of the supervised losses, of a critic on the policy's backbone, of the exact KL."""


def update_of_every_objective(
    rank: int, checkpoint: Path, classifier: Path, teacher: Path, layout: str, tokens: int
) -> Results:
    """Metrics and gradient norm of one update from the checkpoint's weights, by objective.

    Args:
        checkpoint, classifier, teacher: of a policy, of a critic and reward models, and of another policy.
        tokens: micro_batch_tokens.
    """
    policy = start_policy(checkpoint, layout)
    scalar, other, actor_critic = (
        kind(ModelConfig(hf_path=str(path), params_dtype=Dtype.float32), policy.groups, parallel_of(layout), **settings)
        for kind, path, settings in (
            (ScalarModel, classifier, {"per_token": True}),
            (Policy, teacher, {"trained": False}),
            (ActorCritic, checkpoint, {}),
        )
    )
    return dict(
        [
            *_of_policy(policy, tokens),
            *_of_scalar_model(scalar, tokens),
            *_of_distributions(policy, other, tokens),
            *_of_actor_critic(actor_critic, tokens),
            *_of_estimators(policy, tokens),
        ]
    )


def _of_distributions(policy: Policy, teacher: Policy, tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    batch = _batch(policy, recorded_rollouts(), tokens)
    reference = reference_logits(Teacher(teacher), policy, batch.micro_batches)
    for direction in Divergence:
        kl = KLConfig(coefficient=KL_COEFFICIENT, estimator=KLEstimator.exact, direction=direction, mixture=0.3)
        settings = SupervisedConfig(loss="label_smoothed", args={"smoothing": SMOOTHING})
        algorithm = AlgorithmConfig(kl=kl, supervised=settings)
        objective = SupervisedObjective(algorithm, batch.counts, NORM, resolve_supervised_loss(settings), reference)
        yield f"smoothed_{direction.value}", _update(policy, batch, objective)
    for name, args in (("sft", {}), ("focal", {"gamma": 2.0})):
        plain = AlgorithmConfig(supervised=SupervisedConfig(loss=name, args=args))
        loss = resolve_supervised_loss(plain.supervised)
        yield name, _update(policy, batch, SupervisedObjective(plain, batch.counts, NORM, loss))
    algorithm = AlgorithmConfig(kl=KLConfig(coefficient=KL_COEFFICIENT, estimator=KLEstimator.exact))
    yield "ppo_exact_kl", _update(policy, batch, _gradient(algorithm, batch, reference))


def _of_actor_critic(model: ActorCritic, tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    if model.groups.is_last_stage:
        head = model.models[-1].value_head
        with torch.no_grad():
            head.weight.copy_(value_weights(head.weight.shape[1])[None])
    rollouts = recorded_rollouts()
    for sequence in rollouts:
        sequence.per_token["returns"] = sequence.per_token["advantages"] * 3
        sequence.per_token["values"] = sequence.per_token["advantages"] * 2
    batch = _batch(model, rollouts, tokens)
    critic = CriticConfig(shared=True, coefficient=SHARED_COEFFICIENT)
    algorithm = AlgorithmConfig(critic=critic)
    yield "actor_critic", _update(model, batch, _gradient(algorithm, batch), [Values()])


def _of_estimators(policy: Policy, tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Advantage of every completion, and its mean return, under every estimator, whitened over the global batch."""
    samples = recorded_samples()
    for name, whiten in itertools.product(ESTIMATORS, Whitening):
        micro_batches = _batch(policy, [training_sequence(sample) for sample in samples], tokens).micro_batches
        for micro_batch in micro_batches:
            micro_batch.per_token["values"] = (micro_batch.tokens % 7) / 7 + 0.1 * micro_batch.position_ids
        config = AdvantageConfig(estimator=name, gamma=0.9, lam=0.8, whiten=whiten)
        dp, baseline = policy.groups.dp, RunningBaseline(0.3, 1)
        estimator = resolve_estimator(config)
        found = add_advantages(samples, micro_batches, config=config, estimator=estimator, baseline=baseline, dp=dp)
        returns = gathered_means(micro_batches, "returns", len(samples), dp)
        both = {"advantage": found.tolist(), "return": returns.tolist()}
        yield (
            f"{name}_{whiten.value}",
            {f"{what}_{i}": value for what, values in both.items() for i, value in enumerate(values)},
        )


def recorded_samples() -> list[Sample]:
    """Completions of uneven length and groups of uneven size, one of them alone in its own; some with token rewards."""
    rng = np.random.default_rng(13)
    samples = []
    for i, group in enumerate((0, 0, 0, 4, 4, 4, 4, 5, 6, 6)):
        length = int(rng.integers(1, 9))
        ids = tuple(rng.integers(3, 259, size=length).tolist())
        prompt = Prompt(group, (7, 8, 9)[: 1 + group % 3], "p", None, "f:1")
        completion = Completion(ids, (-1.0,) * length, "t", "stop", 0)
        of_tokens = tuple(rng.normal(size=length).tolist())
        samples.append(Sample(prompt, completion, float(sum(of_tokens)) + (i % 3), {}, of_tokens))
    return samples


def value_weights(hidden_size: int) -> torch.Tensor:
    """[H] of a value head that has learned something."""
    return torch.linspace(-0.5, 0.5, hidden_size)


def _gradient(
    algorithm: AlgorithmConfig, batch: MiniBatch, reference: ReferenceLogits | None = None
) -> PolicyGradientObjective:
    loss = resolve_policy_loss(algorithm.policy_loss)
    return PolicyGradientObjective(
        algorithm,
        batch.counts,
        NORM,
        policy_loss=loss,
        on_policy=False,
        kl_coefficient=algorithm.kl.coefficient,
        reference=reference,
    )


def _of_policy(policy: Policy, tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    batch = _batch(policy, recorded_rollouts(), tokens)
    for name, algorithm in _policy_gradients().items():
        yield (
            name,
            _update(
                policy,
                batch,
                PolicyGradientObjective(
                    algorithm,
                    batch.counts,
                    NORM,
                    policy_loss=resolve_policy_loss(algorithm.policy_loss),
                    on_policy=False,
                    kl_coefficient=0.1,
                ),
            ),
        )
    completions = [one for pair in recorded_preferences() for one in pair]
    sequences = [one.for_policy() for one in completions]
    for i, sequence in enumerate(sequences):
        sequence.per_token["ref_log_probs"] = (sequence.loss_mask * (-5.6 + 0.1 * i)).astype(np.float32)
    batch = _batch(policy, sequences, tokens, together=2)
    num_chosen = float(sum(len(one.completion_ids) for one in completions[0::2]))
    for name, preference in PREFERENCES.items():
        loss = resolve_preference_loss(preference, POLICY_LOSSES)
        yield name, _update(policy, batch, PreferenceObjective(preference, loss, batch.counts, num_chosen, 0.3))


def _of_scalar_model(model: ScalarModel, tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    rollouts = recorded_rollouts()
    for sequence in rollouts:
        sequence.per_token["returns"] = sequence.per_token["advantages"] * 3
        sequence.per_token["values"] = sequence.per_token["advantages"] * 2
    batch = _batch(model, rollouts, tokens)
    critic = AlgorithmConfig(critic=CriticConfig(clip=0.5))
    yield "value", _update(model, batch, ValueObjective(critic, batch.counts, NORM))
    completions = [one for pair in recorded_preferences() for one in pair]
    for name, settings in REWARDS.items():
        whole = [LabelledCompletion(one.prompt_ids, one.completion_ids, one.label) for one in completions]
        sequences = [one.for_reward_model() for one in (completions if name == "process" else whole)]
        batch = _batch(model, sequences, tokens, together=2)
        loss = resolve_preference_loss(settings, REWARD_LOSSES)
        yield name, _update(model, batch, RewardObjective(loss, batch.counts))


def _batch(model: Policy, sequences: Sequence[TrainingSequence], tokens: int, together: int = 1) -> MiniBatch:
    return MiniBatch.of(
        sequences,
        range(len(sequences)),
        model.groups,
        micro_batch_tokens=tokens,
        pad_to_multiple=4,
        together=together,
    )


def _update(model: Policy, batch: MiniBatch, objective: LossFunction, extras: Sequence[Extra] = ()) -> dict[str, float]:
    # lr 0: the next objective finds the same weights.
    optimizer = Optimizer(OptimizerConfig(lr=0.0), model, num_steps=1)
    optimizer.zero_grad()
    metrics = forward_backward(model, batch.micro_batches, objective, extras=extras)
    return reduce_metrics(metrics, model.groups.world) | {"grad_norm": optimizer.step().grad_norm}
