"""Penalties: the KL to a reference policy, in the loss or in the reward, and DAPO's for long completions.

The reference may move, and the KL's coefficient may be adapted. Both are part of the run's state and go into its
checkpoints: the coefficient in `RunState.adaptive`, the weights of a reference that is not fixed beside the policy's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_rl.algorithms.kl import adaptive_kl_coefficient, kl_estimate
from megatron_rl.algorithms.reward_shaping import kl_in_rewards, overlong_penalty
from megatron_rl.config.schema import KLConfig, KLEstimator, KLPlace, KLReference, OverlongConfig
from megatron_rl.data.packing import MicroBatch
from megatron_rl.data.samples import Sample
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.reference import ReferenceLogits, ReferenceWeights, Teacher, reference_logits
from megatron_rl.engine.step import forward_log_probs
from megatron_rl.objectives.advantages import TOKEN_REWARDS
from megatron_rl.runs.record import RunState

COEFFICIENT = "kl_coefficient"


class KLPenalty:
    """Of a run with a reference policy, or of one without, where nothing happens."""

    def __init__(self, config: KLConfig, reference: ReferenceWeights | Teacher | None, state: RunState) -> None:
        self.config, self.reference, self.state = config, reference, state
        self.logits: ReferenceLogits | None = None
        """Of the step's micro-batches, where the KL is to be exact."""

    @property
    def coefficient(self) -> float:
        """Of the present step."""
        return self.state.adaptive.get(COEFFICIENT, self.config.coefficient)

    @property
    def in_reward(self) -> bool:
        """Whether the rewards are penalised, for which the old policy's log-probs are needed."""
        return self.reference is not None and self.config.place is KLPlace.reward

    def add_log_probs(self, micro_batches: Sequence[MicroBatch], *, policy: Policy, temperature: float) -> None:
        """Give the micro-batches `ref_log_probs`; for an exact KL, keep the reference's distributions."""
        if self.reference is None:
            return
        with self.reference.swapped_in() as reference:
            outputs = forward_log_probs(reference, micro_batches, temperature=temperature)
        for micro_batch, (log_probs, _) in zip(micro_batches, outputs, strict=True):
            micro_batch.per_token["ref_log_probs"] = log_probs
        if self.config.estimator is KLEstimator.exact:
            self.logits = reference_logits(self.reference, policy, micro_batches)

    def penalise(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Take the penalty off the rewards of the micro-batches' tokens."""
        if not self.in_reward:
            return
        estimator: Any = self.config.estimator.value
        for micro_batch in micro_batches:
            kl = kl_estimate(micro_batch.per_token["old_log_probs"], micro_batch.per_token["ref_log_probs"], estimator)
            rewards = micro_batch.per_token.get(TOKEN_REWARDS, kl.new_zeros(kl.shape))
            micro_batch.per_token[TOKEN_REWARDS] = kl_in_rewards(
                rewards, kl, micro_batch.loss_mask, coefficient=self.coefficient
            )

    def after_step(self, metrics: dict[str, float], num_samples: int) -> dict[str, float]:
        """Adapt the coefficient to the step's KL and move the reference; the coefficient that the step had."""
        if self.reference is None:
            return {}
        used = self.coefficient
        if self.config.target is not None and "policy/kl_ref" in metrics:
            self.state.adaptive[COEFFICIENT] = adaptive_kl_coefficient(
                used,
                metrics["policy/kl_ref"],
                target=self.config.target,
                horizon=self.config.horizon,
                num_samples=num_samples,
            )
        if isinstance(self.reference, ReferenceWeights):
            self._move(self.reference)
        return {"policy/kl_coefficient": used}

    def _move(self, reference: ReferenceWeights) -> None:
        done = self.state.step + 1
        if self.config.reference is KLReference.refreshed and done % self.config.refresh_interval == 0:
            reference.move(0.0)
        if self.config.reference is KLReference.moving_average:
            reference.move(self.config.moving_average_decay)


NAME = "overlong"
"""The term of the punishment in samples and metrics: reward/overlong."""


def punish_length(samples: Sequence[Sample], config: OverlongConfig, *, max_tokens: int) -> list[Sample]:
    """The samples with DAPO's punishment of length in their rewards; as they are without one.

    Args:
        max_tokens: limit of a completion.
    """
    if config.buffer_tokens is None:
        return list(samples)
    lengths = torch.tensor([len(sample.completion.token_ids) for sample in samples])
    terms = overlong_penalty(lengths, max_tokens=max_tokens, buffer_tokens=config.buffer_tokens).tolist()
    return [
        replace(sample, reward=sample.reward + config.penalty * term, reward_terms=sample.reward_terms | {NAME: term})
        for sample, term in zip(samples, terms, strict=True)
    ]
