"""Preference training of a policy: DPO and its kin on pairs, KTO on single completions."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_rl.algorithms.preference_loss import kto_reference_kl
from megatron_rl.algorithms.sequences import sequence_sums
from megatron_rl.config.schema import Config
from megatron_rl.data.packing import PackedRow
from megatron_rl.data.preferences import Judged, Judgement
from megatron_rl.engine.step import LossFunction, forward_log_probs
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.reductions import reduce_counts
from megatron_rl.trainer.judgements import JudgementRecipe, load, train_on
from megatron_rl.trainer.minibatch import MiniBatch
from megatron_rl.trainer.preference_losses import (
    POLICY_LOSSES,
    is_of_pairs,
    needs_reference,
    resolve_preference_loss,
)
from megatron_rl.trainer.preference_objectives import PreferenceObjective
from megatron_rl.trainer.training import Training


def train_preference(config: Config, groups: Groups) -> None:
    """Run or resume preference training."""
    loss = resolve_preference_loss(config.algorithm.preference, POLICY_LOSSES)
    judgements, held_out = load(config, of_pairs=is_of_pairs(loss))
    training = Training(config, groups, num_updates_per_step=1, with_reference=needs_reference(loss))

    def objective(chosen: Sequence[Judgement], batch: MiniBatch) -> LossFunction:
        add_reference(training, batch.rows)
        firsts = [judgement[0] for judgement in chosen]
        return PreferenceObjective(
            config.algorithm.preference,
            loss,
            batch.counts,
            num_chosen_tokens=float(sum(len(judged.completion_ids) for judged in firsts)),
            reference_kl=mismatched_kl(training, firsts) if "reference_kl" in loss.wants else 0.0,
        )

    train_on(training, judgements, held_out, JudgementRecipe(Judged.to_predict, objective))


def add_reference(training: Training, rows: Sequence[PackedRow]) -> None:
    """Give the rows `ref_log_probs`, if the run has a reference."""
    if training.reference is None:
        return
    with training.reference.swapped_in() as reference:
        outputs = forward_log_probs(reference, rows)
    for row, (log_probs, _) in zip(rows, outputs, strict=True):
        row.per_token["ref_log_probs"] = log_probs


def mismatched_kl(training: Training, batch: Sequence[Judged]) -> float:
    """z of KTO: how far the policy shifted the completions of other prompts; nats, collective.

    Each prompt gets the completion of the next one of the global batch.
    """
    shifted = [replace(judged, completion_ids=batch[i - 1].completion_ids) for i, judged in enumerate(batch)]
    sequences = [judged.to_predict() for judged in shifted]
    rows = training.minibatch(sequences, range(len(sequences))).rows
    add_reference(training, rows)
    total, count = 0.0, 0
    for row, (log_probs, _) in zip(rows, forward_log_probs(training.policy, rows), strict=True):
        ratios = sequence_sums(log_probs - row.per_token["ref_log_probs"], row.loss_mask, row.cu_seqlens)
        total, count = total + float(ratios.sum()), count + len(row.sequence_ids)
    return kto_reference_kl(*reduce_counts([total, count], training.groups.dp))
