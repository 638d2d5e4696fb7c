"""The objectives: what turns the outputs of a micro-batch into a loss, from the algorithm's independent choices.

Built once per optimizer step, when the counts of its global batch are known; the engine calls the result per
micro-batch. Those on preference data are in `preference_objectives`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import GlobalCounts, aggregation_weights, weighted, weighted_sum
from megatron_rl.algorithms.diagnostics import mismatch_metrics, policy_change_metrics
from megatron_rl.algorithms.importance import correction_weights, importance_metrics, log_ratios
from megatron_rl.algorithms.kl import kl_estimate, weighted_kl_estimate
from megatron_rl.algorithms.metrics import Metric, masked_mean
from megatron_rl.algorithms.value_loss import clipped_value_loss, combined_loss, value_loss, value_metrics
from megatron_rl.config.functions import Bound
from megatron_rl.config.schema import AlgorithmConfig, CorrectionMethod, KLConfig, KLPlace
from megatron_rl.data.packing import DIVERGENCE, MEAN_LOG_PROBS, NEW_VALUES, MicroBatch
from megatron_rl.engine.reference import ReferenceLogits
from megatron_rl.objectives.losses import SFT, TOKEN_LOSSES, loss_metrics
from megatron_rl.parallel.fused_linear_logits_loss import OfLogits
from megatron_rl.parallel.fused_linear_token_loss import TokenLosses, Tokens
from megatron_rl.parallel.vocab_parallel_divergences import ShardedLogits

Loss = tuple[Tensor, dict[str, Metric]]


@dataclass(frozen=True)
class TokenObjective:
    """What objectives on tokens share: how the tokens of a micro-batch are weighed."""

    algorithm: AlgorithmConfig
    counts: GlobalCounts
    """Tokens and sequences of the optimizer step's global batch."""
    token_sum_norm: float
    """Constant of the aggregation 'token_sum_norm'."""

    def weights(self, micro_batch: MicroBatch) -> Tensor:
        """[T]: how much each token's loss counts."""
        return aggregation_weights(
            micro_batch.loss_mask,
            micro_batch.cu_seqlens,
            mode=self.algorithm.aggregation.value,
            counts=self.counts,
            token_sum_norm=self.token_sum_norm,
        )

    def loss_metric(self, loss: Tensor, micro_batch: MicroBatch) -> Metric:
        """A micro-batch's part of the loss. The micro-batches' counts add up to 1 per optimizer step: a step's updates
        are averaged."""
        return Metric("mean", loss.detach(), micro_batch.loss_mask.sum().double() / self.counts.num_tokens)


@dataclass(frozen=True)
class SupervisedObjective(TokenObjective):
    """A loss of the response tokens, their negative log-likelihood unless another is configured, + KL penalty."""

    loss: Bound = SFT
    """Of `losses.resolve_supervised_loss`."""
    reference: ReferenceLogits | None = None
    """Of the step's micro-batches; None: no penalty. The tokens are no samples of the policy, so the penalty is
    exact."""

    def token_losses(self, micro_batch: MicroBatch) -> TokenLosses | OfLogits | None:
        """See engine.step.LossFunction."""
        weights = self.weights(micro_batch)
        if self.reference is not None or "mean_log_probs" in self.loss.wants:
            return OfLogits(lambda logits, tokens: self._of_logits(logits, micro_batch, weights[tokens]))
        return lambda log_probs, entropy, tokens: weighted(self._total(log_probs, {}), weights[tokens])

    def _of_logits(
        self, logits: ShardedLogits, micro_batch: MicroBatch, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, mean = logits.log_probs_of(logits.labels[:, None])
        values = {MEAN_LOG_PROBS: mean}
        if self.reference is not None:
            values[DIVERGENCE] = _divergence(logits, self.reference, micro_batch, self.algorithm.kl)
        return weighted(self._total(log_probs[:, 0], values), weights), values

    def _total(self, log_probs: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """[n]: loss and penalty of n tokens."""
        algorithm, total = self.algorithm, torch.zeros_like(log_probs)
        if algorithm.supervised.coefficient:
            loss = self.loss(log_probs=log_probs, mean_log_probs=values.get(MEAN_LOG_PROBS))
            total = algorithm.supervised.coefficient * loss
        if DIVERGENCE in values:
            total = total + algorithm.kl.coefficient * values[DIVERGENCE]
        return total

    def __call__(self, log_probs: Tensor, entropy: Tensor, micro_batch: MicroBatch) -> Loss:
        """See engine.step.LossFunction."""
        loss = weighted_sum(self._total(log_probs, micro_batch.per_token), self.weights(micro_batch))
        metrics = {
            "sft/loss": self.loss_metric(loss, micro_batch),
            "policy/entropy": masked_mean(entropy, micro_batch.loss_mask),
        }
        if DIVERGENCE in micro_batch.per_token:
            metrics["policy/kl_ref"] = masked_mean(micro_batch.per_token[DIVERGENCE], micro_batch.loss_mask)
        return loss, metrics


def _divergence(logits: ShardedLogits, reference: ReferenceLogits, micro_batch: MicroBatch, kl: KLConfig) -> Tensor:
    """[n] of the tokens that the logits are of, from the reference's."""
    return logits.divergence(reference[micro_batch.sequence_ids](logits.slots), kl.direction.value, kl.mixture)


@dataclass(frozen=True)
class PolicyGradientObjective(TokenObjective):
    """The configured policy loss, corrected for the rollout, + KL penalty - entropy bonus; + the value loss of a critic
    that is on the policy's backbone."""

    policy_loss: Bound
    """Of `losses.resolve_policy_loss`."""
    on_policy: bool
    """The old policy is the current one: old log-probs are the present ones, and the ratio is exactly 1."""
    kl_coefficient: float
    """Of this step."""
    reference: ReferenceLogits | None = None
    """Of the step's micro-batches, for the exact KL; None: it is estimated."""

    def _values(self, log_probs: Tensor, entropy: Tensor, micro_batch: MicroBatch, tokens: Tokens) -> dict[str, Any]:
        """What a policy loss may ask for, of some tokens of the micro-batch."""
        per_token = micro_batch.per_token
        reference = per_token.get("ref_log_probs")
        return dict(
            log_probs=log_probs,
            old_log_probs=log_probs.detach() if self.on_policy else per_token["old_log_probs"][tokens],
            advantages=per_token["advantages"][tokens],
            rollout_log_probs=per_token["rollout_log_probs"][tokens],
            ref_log_probs=None if reference is None else reference[tokens],
            entropy=entropy,
            loss_mask=micro_batch.loss_mask[tokens],
            cu_seqlens=micro_batch.cu_seqlens,
        )

    def token_losses(self, micro_batch: MicroBatch) -> TokenLosses | OfLogits | None:
        """See engine.step.LossFunction."""
        algorithm, weights, correction = self.algorithm, self.weights(micro_batch), None
        if algorithm.policy_loss.name not in TOKEN_LOSSES or algorithm.critic.shared:
            return None
        if algorithm.correction.method is not CorrectionMethod.metrics_only:
            if self.on_policy and self.reference is None:
                return None  # the old policy's log-probs are not known before the micro-batch's own
            correction, _ = self._correction(micro_batch.per_token["old_log_probs"], micro_batch)

        def losses(log_probs: Tensor, entropy: Tensor, tokens: Tokens, kl: Tensor | None = None) -> Tensor:
            values = self._values(log_probs, entropy, micro_batch, tokens)
            total = self.policy_loss(**values)
            if correction is not None:
                total = total * correction[tokens]
            if algorithm.entropy_coefficient:
                total = total - algorithm.entropy_coefficient * entropy
            if kl is None and values["ref_log_probs"] is not None and algorithm.kl.place is KLPlace.loss:
                kl = self._kl(log_probs, values["old_log_probs"], values["ref_log_probs"])
            if kl is not None:
                total = total + self.kl_coefficient * kl
            return weighted(total, weights[tokens])

        def of_logits(logits: ShardedLogits, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
            assert self.reference is not None
            kl = _divergence(logits, self.reference, micro_batch, algorithm.kl)
            return losses(*logits.log_probs(), tokens, kl), {DIVERGENCE: kl}

        return losses if self.reference is None else OfLogits(of_logits)

    def __call__(self, log_probs: Tensor, entropy: Tensor, micro_batch: MicroBatch) -> Loss:
        """See engine.step.LossFunction."""
        algorithm, mask, per_token = self.algorithm, micro_batch.loss_mask, micro_batch.per_token
        values = self._values(log_probs, entropy, micro_batch, slice(None))
        old = values["old_log_probs"]
        losses = self.policy_loss(**values)
        correction, metrics = self._correction(old, micro_batch)
        if correction is not None:
            losses = losses * correction
        metrics |= {
            "policy/entropy": masked_mean(entropy, mask),
            **loss_metrics(algorithm.policy_loss, values),
            **policy_change_metrics(log_probs, old, mask),
            # Of the old policy, which sampled: later updates of a step move on, which is not a mismatch.
            **mismatch_metrics(old, per_token["rollout_log_probs"], mask),
        }
        kl = None
        if DIVERGENCE in per_token:
            kl = per_token[DIVERGENCE]
        elif "ref_log_probs" in per_token:
            kl = self._kl(log_probs, old, per_token["ref_log_probs"])
        if kl is not None:
            metrics["policy/kl_ref"] = masked_mean(kl, mask)
        value_losses = None
        if NEW_VALUES in per_token:
            value_losses, of_values = _value_losses(per_token[NEW_VALUES], micro_batch, algorithm.critic.clip)
            metrics |= of_values
        in_loss = kl is not None and algorithm.kl.place is KLPlace.loss
        loss, terms = combined_loss(
            losses,
            self.weights(micro_batch),
            values=None if value_losses is None else (value_losses, algorithm.critic.coefficient),
            entropy=(entropy, algorithm.entropy_coefficient) if algorithm.entropy_coefficient else None,
            kl=(kl, self.kl_coefficient) if in_loss and kl is not None else None,
        )
        metrics["policy/loss"] = self.loss_metric(loss, micro_batch)
        if value_losses is not None:
            metrics["value/loss"] = self.loss_metric(terms["value"] / algorithm.critic.coefficient, micro_batch)
        if len(terms) > 1:
            metrics |= {f"policy/loss_{name}": self.loss_metric(term, micro_batch) for name, term in terms.items()}
        return loss, metrics

    def _kl(self, log_probs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
        estimator: Any = self.algorithm.kl.estimator.value
        if self.algorithm.kl.weighted:
            return weighted_kl_estimate(log_probs, old, reference, estimator)
        return kl_estimate(log_probs, reference, estimator)

    def _correction(self, old: Tensor, micro_batch: MicroBatch) -> tuple[Tensor | None, dict[str, Metric]]:
        """Weights of the tokens, if any, for the difference between the old policy and the engine that sampled."""
        settings = self.algorithm.correction
        ratios = log_ratios(
            old.detach(),
            micro_batch.per_token["rollout_log_probs"],
            micro_batch.loss_mask,
            micro_batch.cu_seqlens,
            level=settings.level.value,
        )
        metrics = importance_metrics(ratios, micro_batch.loss_mask, low=settings.low, high=settings.high)
        if settings.method is CorrectionMethod.metrics_only:
            return None, metrics
        return correction_weights(ratios, method=settings.method.value, low=settings.low, high=settings.high), metrics


@dataclass(frozen=True)
class ValueObjective(TokenObjective):
    """The critic's squared error, on a micro-batch with `returns` and the `values` before the step's first update."""

    def __call__(self, values: Tensor, micro_batch: MicroBatch) -> Loss:
        """See engine.step.LossFunction."""
        losses, metrics = _value_losses(values, micro_batch, self.algorithm.critic.clip)
        loss = weighted_sum(losses, self.weights(micro_batch))
        return loss, {"value/loss": self.loss_metric(loss, micro_batch), **metrics}


def _value_losses(values: Tensor, micro_batch: MicroBatch, clip: float | None) -> tuple[Tensor, dict[str, Metric]]:
    """[T], of a micro-batch with `returns` and the `values` before the step's first update; and what describes them."""
    returns, old = micro_batch.per_token["returns"], micro_batch.per_token["values"]
    losses = value_loss(values, returns) if clip is None else clipped_value_loss(values, old, returns, clip=clip)
    return losses, value_metrics(values.detach(), returns, micro_batch.loss_mask, old_values=old, clip=clip)
