"""The objectives: what turns the log-probs of a packed row into a loss, from the algorithm's independent choices.

Built once per optimizer step, when the counts of its global batch are known; the engine calls the result per row.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_rl.algorithms.aggregation import GlobalCounts, aggregation_weights, weighted_sum
from megatron_rl.algorithms.kl import kl_estimate
from megatron_rl.algorithms.metrics import Metric, masked_mean
from megatron_rl.algorithms.mismatch import mismatch_metrics
from megatron_rl.algorithms.policy_loss import ppo_clip_loss, ppo_clip_metrics
from megatron_rl.algorithms.supervised_loss import sft_loss
from megatron_rl.config.schema import AlgorithmConfig, KLPlace
from megatron_rl.data.packing import PackedRow

Loss = tuple[Tensor, dict[str, Metric]]


@dataclass(frozen=True)
class SupervisedObjective:
    """Negative log-likelihood of the response tokens."""

    algorithm: AlgorithmConfig
    counts: GlobalCounts
    """Tokens and sequences of the optimizer step's global batch."""
    token_sum_norm: float
    """Constant of the aggregation 'token_sum_norm'."""

    def weights(self, row: PackedRow) -> Tensor:
        """[T]: how much each token's loss counts."""
        return aggregation_weights(
            row.loss_mask,
            row.cu_seqlens,
            mode=self.algorithm.aggregation.value,
            counts=self.counts,
            token_sum_norm=self.token_sum_norm,
        )

    def loss_metric(self, loss: Tensor, row: PackedRow) -> Metric:
        """A row's part of the loss. The rows' counts add up to 1 per optimizer step: a step's updates are averaged."""
        return Metric("mean", float(loss.detach()), float(row.loss_mask.sum()) / self.counts.num_tokens)

    def __call__(self, log_probs: Tensor, entropy: Tensor, row: PackedRow) -> Loss:
        """See engine.step.LossFunction."""
        loss = weighted_sum(sft_loss(log_probs), self.weights(row))
        return loss, {
            "sft/loss": self.loss_metric(loss, row),
            "policy/entropy": masked_mean(entropy, row.loss_mask),
        }


@dataclass(frozen=True)
class PolicyGradientObjective(SupervisedObjective):
    """Clipped surrogate + KL penalty - entropy bonus."""

    on_policy: bool
    """The old policy is the current one: old log-probs are the present ones, and the ratio is exactly 1."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, row: PackedRow) -> Loss:
        """See engine.step.LossFunction."""
        algorithm, mask, weights = self.algorithm, row.loss_mask, self.weights(row)
        old = log_probs.detach() if self.on_policy else row.per_token["old_log_probs"]
        advantages = row.per_token["advantages"]
        clip: Any = dict(
            clip_low=algorithm.policy_loss.clip_low,
            clip_high=algorithm.policy_loss.clip_high,
            dual_clip=algorithm.policy_loss.dual_clip,
        )
        policy_loss = weighted_sum(ppo_clip_loss(log_probs, old, advantages, **clip), weights)
        entropy_term = weighted_sum(entropy, weights)
        loss = policy_loss - algorithm.entropy_coefficient * entropy_term
        metrics = {
            "policy/entropy": masked_mean(entropy, mask),
            **ppo_clip_metrics(log_probs, old, advantages, mask, **clip),
            # Of the old policy, which sampled: later updates of a step move on, which is not a mismatch.
            **mismatch_metrics(old, row.per_token["rollout_log_probs"], mask),
        }
        if "ref_log_probs" in row.per_token:
            kl = kl_estimate(log_probs, row.per_token["ref_log_probs"], algorithm.kl.estimator.value)
            metrics["policy/kl_ref"] = masked_mean(kl, mask)
            if algorithm.kl.place is KLPlace.loss:
                loss = loss + algorithm.kl.coefficient * weighted_sum(kl, weights)
        metrics["policy/loss"] = self.loss_metric(loss, row)
        return loss, metrics
