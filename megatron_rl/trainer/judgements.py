"""The loop of the recipes on judged completions: draw, lay out, prepare, update; now and then evaluate.

What differs between a policy trained on preferences and a reward model is given as functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.algorithms.metrics import Metric, combine
from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import Config
from megatron_rl.data.order import DataOrder
from megatron_rl.data.preferences import Judged, Judgement, load_judgements
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.scalar_model import ScalarModel
from megatron_rl.engine.step import LossFunction, forward_log_probs, forward_values
from megatron_rl.trainer.minibatch import MiniBatch
from megatron_rl.trainer.tokenizer import load_tokenizer
from megatron_rl.trainer.training import Training


@dataclass(frozen=True)
class JudgementRecipe:
    """What a recipe does with judged completions."""

    lay_out: Callable[[Judged], TrainingSequence]
    """For the model that is trained."""
    objective: Callable[[Sequence[Judgement], MiniBatch], LossFunction]
    """Prepares the rows of an optimizer step and gives their loss; collective."""


def load(config: Config, *, of_pairs: bool) -> tuple[list[Judgement], list[Judgement]]:
    """Training and held-out judgements.

    Raises:
        UserError: a row cannot be used; it is named by file and line. Or the loss is of pairs and the file is not, or
            the other way round.
    """
    tokenizer = load_tokenizer(config.model.hf_path)
    found: list[list[Judgement]] = []
    for key, file in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        found.append(
            [] if file is None else load_judgements(file, config.data, tokenizer, max_tokens=_max_tokens(config))
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
    training: Training, judgements: Sequence[Judgement], held_out: Sequence[Judgement], recipe: JudgementRecipe
) -> None:
    """Run or resume."""
    config, state = training.config, training.state
    order = DataOrder(len(judgements), config.seed, config.data.shuffle)
    batch_size = config.train.global_batch_size or 1
    interval = config.evaluation.interval
    with training:
        if state.step == 0 and held_out:
            training.record(_evaluate(training, held_out, recipe))
        while not training.is_done:
            with training.step() as row:
                chosen = [judgements[i] for i in order.rows(state.data_position, batch_size)]
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


def _batch(training: Training, chosen: Sequence[Judgement], recipe: JudgementRecipe) -> MiniBatch:
    sequences = [recipe.lay_out(judged) for judgement in chosen for judged in judgement]
    return training.minibatch(sequences, range(len(sequences)), together=len(chosen[0]))


@torch.no_grad()
def _evaluate(training: Training, held_out: Sequence[Judgement], recipe: JudgementRecipe) -> dict[str, float]:
    """eval/<name>/{loss, pair_accuracy, ...} over all held-out judgements, as one batch."""
    batch = _batch(training, held_out, recipe)
    objective = recipe.objective(held_out, batch)
    metrics: dict[str, Metric] = {}
    is_scalar = isinstance(training.policy, ScalarModel)
    outputs = (
        [(values,) for values in forward_values(training.policy, batch.rows)]
        if is_scalar
        else forward_log_probs(training.policy, batch.rows)
    )
    for row, of_row in zip(batch.rows, outputs, strict=True):
        _, of_rows = objective(*of_row, row)
        metrics = combine(metrics, of_rows)
    found = training.reduce(metrics if training.groups.reports else {})
    names = {"preference/loss": "loss", "preference/accuracy": "pair_accuracy", "preference/margin": "margin"}
    names |= {"process_reward/accuracy": "step_accuracy", "preference/abs_error": "abs_error"}
    prefix = f"eval/{training.config.evaluation.name}/"
    return {prefix + name: found[metric] for metric, name in names.items() if metric in found}
