"""Training on preference data: the recipes `preference` and `reward_model`.

train_preference    a policy: DPO and related losses on pairs, KTO on single completions
train_reward_model  a reward model: on pairs (Bradley-Terry), on scores (regression), on steps (process rewards)
train_on            the loop of both: draw, lay out, update, now and then evaluate; a `PreferenceRecipe` holds what
                    differs
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_rl.algorithms.aggregation import sequence_sums
from megatron_rl.algorithms.metrics import Metric, combine
from megatron_rl.algorithms.preference_loss import kto_reference_kl
from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import Config
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.datasets import DataOrder
from megatron_rl.data.packing import MicroBatch
from megatron_rl.data.preferences import LabelledCompletion, PreferenceExample, load_preferences
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.scalar_model import ScalarModel
from megatron_rl.engine.step import LossFunction, forward_log_probs, forward_values
from megatron_rl.objectives.losses import (
    POLICY_LOSSES,
    REWARD_LOSSES,
    is_of_pairs,
    needs_reference,
    resolve_preference_loss,
)
from megatron_rl.objectives.minibatch import MiniBatch
from megatron_rl.objectives.preference_objectives import PreferenceObjective, RewardObjective
from megatron_rl.parallel.groups import Groups, reduce_counts
from megatron_rl.trainer.training import Training


@dataclass(frozen=True)
class PreferenceRecipe:
    """How a recipe lays out completions, and its objective."""

    lay_out: Callable[[LabelledCompletion], TrainingSequence]
    """For the model that is trained."""
    objective: Callable[[Sequence[PreferenceExample], MiniBatch], LossFunction]
    """Prepares the micro-batches of an optimizer step and gives their loss; collective."""


def load(config: Config, *, of_pairs: bool) -> tuple[list[PreferenceExample], list[PreferenceExample]]:
    """Training and held-out examples.

    Raises:
        UserError: a row cannot be used; it is named by file and line. Or the loss is of pairs and the file is not, or
            the other way round.
    """
    tokenizer = load_tokenizer(config.model.hf_path)
    found: list[list[PreferenceExample]] = []
    for key, file in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        found.append(
            [] if file is None else load_preferences(file, config.data, tokenizer, max_tokens=_max_tokens(config))
        )
        if found[-1] and (len(found[-1][0]) == 2) is not of_pairs:
            kind = "pairs (prompt, chosen, rejected)" if of_pairs else "single completions (prompt, response, label)"
            raise UserError(
                f"{key}: given '{file}'; algorithm.preference.loss={config.algorithm.preference.loss} needs {kind}"
            )
    return found[0], found[1]


def _max_tokens(config: Config) -> int:
    return config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens


def train_on(
    training: Training,
    examples: Sequence[PreferenceExample],
    held_out: Sequence[PreferenceExample],
    recipe: PreferenceRecipe,
) -> None:
    """Run or resume."""
    config, state = training.config, training.state
    order = DataOrder(len(examples), config.seed, config.data.shuffle)
    batch_size = config.train.global_batch_size or 1
    interval = config.evaluation.interval
    with training:
        if state.step == 0 and held_out:
            training.record(_evaluate(training, held_out, recipe))
        while not training.is_done:
            with training.step() as row:
                chosen = [examples[i] for i in order.rows(state.data_position, batch_size)]
                state.data_position += batch_size
                with training.timer.phase("train"):
                    batch = _batch(training, chosen, recipe)
                    objective = recipe.objective(chosen, batch)
                    row |= training.reduce(training.update(batch, objective))
                row["throughput/tokens"] = batch.num_tokens
                done = state.step + 1
                if held_out and (done == config.train.num_steps or (interval and done % interval == 0)):
                    with training.timer.phase("evaluate"):
                        row |= _evaluate(training, held_out, recipe)
        training.finish()


def _batch(training: Training, chosen: Sequence[PreferenceExample], recipe: PreferenceRecipe) -> MiniBatch:
    sequences = [recipe.lay_out(completion) for example in chosen for completion in example]
    return training.minibatch(sequences, range(len(sequences)), together=len(chosen[0]))


@torch.no_grad()
def _evaluate(training: Training, held_out: Sequence[PreferenceExample], recipe: PreferenceRecipe) -> dict[str, float]:
    """eval/<name>/{loss, pair_accuracy, ...} over all held-out examples, as one batch."""
    batch = _batch(training, held_out, recipe)
    objective = recipe.objective(held_out, batch)
    metrics: dict[str, Metric] = {}
    is_scalar = isinstance(training.policy, ScalarModel)
    outputs = (
        [(values,) for values in forward_values(training.policy, batch.micro_batches)]
        if is_scalar
        else forward_log_probs(training.policy, batch.micro_batches)
    )
    for micro_batch, of_micro_batch in zip(batch.micro_batches, outputs, strict=True):
        _, of_micro_batches = objective(*of_micro_batch, micro_batch)
        metrics = combine(metrics, of_micro_batches)
    found = training.reduce(metrics if training.groups.reports else {})
    names = {"preference/loss": "loss", "preference/accuracy": "pair_accuracy", "preference/margin": "margin"}
    names |= {"process_reward/accuracy": "step_accuracy", "preference/abs_error": "abs_error"}
    prefix = f"eval/{training.config.evaluation.name}/"
    return {prefix + name: found[metric] for metric, name in names.items() if metric in found}


def train_preference(config: Config, groups: Groups) -> None:
    """Run or resume preference training."""
    loss = resolve_preference_loss(config.algorithm.preference, POLICY_LOSSES)
    examples, held_out = load(config, of_pairs=is_of_pairs(loss))
    training = Training(config, groups, num_updates_per_step=1, with_reference=needs_reference(loss))

    def objective(chosen: Sequence[PreferenceExample], batch: MiniBatch) -> LossFunction:
        add_reference(training, batch.micro_batches)
        firsts = [example[0] for example in chosen]
        return PreferenceObjective(
            config.algorithm.preference,
            loss,
            batch.counts,
            num_chosen_tokens=float(sum(len(completion.completion_ids) for completion in firsts)),
            reference_kl=mismatched_kl(training, firsts) if "reference_kl" in loss.wants else 0.0,
        )

    train_on(training, examples, held_out, PreferenceRecipe(LabelledCompletion.for_policy, objective))


def add_reference(training: Training, micro_batches: Sequence[MicroBatch]) -> None:
    """Give the micro-batches `ref_log_probs`, if the run has a reference."""
    if training.reference is None:
        return
    with training.reference.swapped_in() as reference:
        outputs = forward_log_probs(reference, micro_batches)
    for micro_batch, (log_probs, _) in zip(micro_batches, outputs, strict=True):
        micro_batch.per_token["ref_log_probs"] = log_probs


def mismatched_kl(training: Training, batch: Sequence[LabelledCompletion]) -> float:
    """z of KTO: how far the policy shifted the completions of other prompts; nats, collective.

    Each prompt gets the completion of the next one of the global batch.
    """
    shifted = [replace(completion, completion_ids=batch[i - 1].completion_ids) for i, completion in enumerate(batch)]
    sequences = [completion.for_policy() for completion in shifted]
    micro_batches = training.minibatch(sequences, range(len(sequences))).micro_batches
    add_reference(training, micro_batches)
    total, count = 0.0, 0
    for micro_batch, (log_probs, _) in zip(
        micro_batches, forward_log_probs(training.policy, micro_batches), strict=True
    ):
        ratios = sequence_sums(
            log_probs - micro_batch.per_token["ref_log_probs"], micro_batch.loss_mask, micro_batch.cu_seqlens
        )
        total, count = total + float(ratios.sum()), count + len(micro_batch.sequence_ids)
    return kto_reference_kl(*reduce_counts([total, count], training.groups.dp))


def train_reward_model(config: Config, groups: Groups) -> None:
    """Run or resume the training of a reward model; it is exported as a Hugging Face classifier of one label."""
    loss = resolve_preference_loss(config.algorithm.preference, REWARD_LOSSES)
    examples, held_out = load(config, of_pairs=is_of_pairs(loss))
    build = partial(ScalarModel, per_token="logits" in loss.wants)
    training = Training(config, groups, num_updates_per_step=1, build=build)

    def objective(chosen: Sequence[PreferenceExample], batch: MiniBatch) -> LossFunction:
        return RewardObjective(loss, batch.counts)

    train_on(training, examples, held_out, PreferenceRecipe(LabelledCompletion.for_reward_model, objective))
