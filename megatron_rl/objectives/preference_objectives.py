"""Objectives on preference data: what turns the outputs of a micro-batch into one loss per pair or completion.

In a micro-batch of pairs a chosen completion stands before its rejected one, so sequences 0, 2, 4, ... of the
micro-batch are chosen. Losses are divided by the pairs (or completions, or labelled steps) of the global batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import GlobalCounts, sequence_means, sequence_sums
from megatron_rl.algorithms.metrics import Metric, masked_mean
from megatron_rl.algorithms.preference_loss import implicit_rewards, preference_metrics, process_reward_metrics
from megatron_rl.config.functions import Bound
from megatron_rl.config.schema import PreferenceConfig
from megatron_rl.data.packing import MicroBatch
from megatron_rl.objectives.losses import OF_MEANS, is_of_pairs
from megatron_rl.objectives.objectives import Loss


@dataclass(frozen=True)
class PreferenceObjective:
    """A policy's loss on pairs, or on single completions with a label."""

    settings: PreferenceConfig
    loss: Bound
    """Of `losses.resolve_preference_loss`."""
    counts: GlobalCounts
    """Of the optimizer step's global batch."""
    num_chosen_tokens: float
    """Trained tokens of its chosen completions."""
    reference_kl: float = 0.0
    """Of KTO; nats."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, micro_batch: MicroBatch) -> Loss:
        """See engine.step.LossFunction."""
        policy = self._of_completions(log_probs, micro_batch)
        reference = micro_batch.per_token.get("ref_log_probs")
        ref = policy.new_zeros(policy.shape) if reference is None else self._of_completions(reference, micro_batch)
        rewards = implicit_rewards(policy.detach(), ref, beta=self.settings.beta)
        metrics = {"policy/entropy": masked_mean(entropy, micro_batch.loss_mask)}
        if is_of_pairs(self.loss):
            losses = self._of_pairs(policy, ref, micro_batch)
            metrics |= preference_metrics(rewards[0::2], rewards[1::2], torch.ones_like(losses))
        else:
            desirable = _at_completions("label", micro_batch, policy) > 0.5
            losses = self._of_single(policy, ref, desirable)
            metrics |= {
                "preference/chosen_reward": masked_mean(rewards, desirable.float()),
                "preference/rejected_reward": masked_mean(rewards, (~desirable).float()),
            }
        loss = losses.sum() / self._num_units
        metrics["preference/loss"] = Metric("mean", loss.detach(), len(losses) / self._num_units)
        if self.settings.sft_coefficient:
            sft = (
                -sequence_sums(log_probs, micro_batch.loss_mask, _cu_seqlens(micro_batch))[0::2].sum()
                / self.num_chosen_tokens
            )
            metrics["preference/sft_loss"] = Metric("mean", sft.detach(), len(losses) / self._num_units)
            loss = loss + self.settings.sft_coefficient * sft.to(loss.dtype)
        return loss, metrics

    @property
    def _num_units(self) -> float:
        return self.counts.num_sequences / (2 if is_of_pairs(self.loss) else 1)

    def _of_completions(self, log_probs: Tensor, micro_batch: MicroBatch) -> Tensor:
        """[S] float32: log-prob of each completion, or the mean over its tokens."""
        averaged = self.settings.length_normalized or self.loss.name in OF_MEANS
        reduce = sequence_means if averaged else sequence_sums
        return reduce(log_probs, micro_batch.loss_mask, _cu_seqlens(micro_batch)).float()

    def _of_pairs(self, policy: Tensor, ref: Tensor, micro_batch: MicroBatch) -> Tensor:
        values: dict[str, Any] = dict.fromkeys(self.loss.wants)
        values |= {"chosen": policy[0::2], "rejected": policy[1::2]}
        values |= {"ref_chosen": ref[0::2], "ref_rejected": ref[1::2]}
        values["margin"] = _at_completions("label", micro_batch, policy)[0::2]
        return self.loss(**values)  # type: ignore[no-any-return]

    def _of_single(self, policy: Tensor, ref: Tensor, desirable: Tensor) -> Tensor:
        values: dict[str, Any] = dict.fromkeys(self.loss.wants)
        values |= {"log_probs": policy, "ref_log_probs": ref, "desirable": desirable}
        return self.loss(**values | {"reference_kl": self.reference_kl})  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RewardObjective:
    """A reward model's loss on pairs, on single completions with a score, or on steps with a label."""

    loss: Bound
    """Of `losses.resolve_preference_loss`."""
    counts: GlobalCounts
    """Of the optimizer step's global batch; its tokens are the labelled ones."""

    def __call__(self, values: Tensor, micro_batch: MicroBatch) -> Loss:
        """See engine.step.LossFunction. The loss mask is 1 where a score is read."""
        mask = micro_batch.loss_mask
        if "logits" in self.loss.wants:
            labels = micro_batch.per_token["label"]
            losses = torch.where(mask > 0, self.loss(**_filled(self.loss, logits=values, labels=labels)), 0.0)
            share, metrics = mask.sum() / self.counts.num_tokens, process_reward_metrics(values, labels, mask)
            return self._summed(losses.sum() / self.counts.num_tokens, float(share), metrics)
        scores = sequence_sums(values, mask, _cu_seqlens(micro_batch)).float()
        label = _at_completions("label", micro_batch, scores)
        if is_of_pairs(self.loss):
            chosen, rejected = scores[0::2], scores[1::2]
            losses = self.loss(**_filled(self.loss, chosen=chosen, rejected=rejected, margin=label[0::2]))
            metrics = preference_metrics(chosen.detach(), rejected.detach(), torch.ones_like(losses))
        else:
            losses = self.loss(**_filled(self.loss, rewards=scores, targets=label))
            error = (scores.detach() - label).abs()
            metrics = {"preference/abs_error": masked_mean(error, torch.ones_like(error))}
        num_units = self.counts.num_sequences / (2 if is_of_pairs(self.loss) else 1)
        return self._summed(losses.sum() / num_units, len(losses) / num_units, metrics)

    def _summed(self, loss: Tensor, share: float, metrics: dict[str, Metric]) -> Loss:
        return loss, {"preference/loss": Metric("mean", loss.detach(), share), **metrics}


def _cu_seqlens(micro_batch: MicroBatch) -> Tensor:
    """Without the padding, which the micro-batch counts as one more sequence."""
    return micro_batch.cu_seqlens[: len(micro_batch.sequence_ids) + 1]


def _at_completions(name: str, micro_batch: MicroBatch, like: Tensor) -> Tensor:
    """[S]: a per-token value that is equal on a completion's trained tokens."""
    return sequence_means(micro_batch.per_token[name], micro_batch.loss_mask, _cu_seqlens(micro_batch)).to(like.dtype)


def _filled(loss: Bound, **values: Any) -> dict[str, Any]:
    """The values with None for whatever else a loss names."""
    return dict.fromkeys(loss.wants) | values
