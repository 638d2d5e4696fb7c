"""Supervised fine-tuning: the last verbs of the loop, on prompts with given responses."""

from collections.abc import Sequence

from megatron_rl.algorithms.metrics import Metric, combine, masked_mean
from megatron_rl.config.schema import Config
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.datasets import DataOrder, load_sft
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.reference import reference_logits
from megatron_rl.engine.step import forward_log_probs
from megatron_rl.objectives.losses import resolve_supervised_loss
from megatron_rl.objectives.objectives import SupervisedObjective
from megatron_rl.parallel.groups import Groups
from megatron_rl.trainer.training import Training


def train_sft(config: Config, groups: Groups) -> None:
    """Run or resume supervised fine-tuning."""
    loss = resolve_supervised_loss(config.algorithm.supervised)
    with_reference = config.algorithm.kl.coefficient > 0
    training = Training(config, groups, num_updates_per_step=1, with_reference=with_reference)
    tokenizer = load_tokenizer(config.model.hf_path)
    max_tokens = config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens
    sequences = load_sft(str(config.data.train), config.data, tokenizer, max_tokens=max_tokens)
    held_out = load_sft(config.data.eval, config.data, tokenizer, max_tokens=max_tokens) if config.data.eval else []
    order = DataOrder(len(sequences), config.seed, config.data.shuffle)
    batch_size = config.train.global_batch_size or 1
    state, interval = training.state, config.evaluation.interval
    with training:
        while not training.is_done:
            with training.step() as row:
                batch = training.minibatch(sequences, order.rows(state.data_position, batch_size))
                state.data_position += batch_size
                reference = None
                if training.reference is not None:
                    with training.timer.phase("log_probs"):
                        reference = reference_logits(training.reference, training.policy, batch.micro_batches)
                with training.timer.phase("train"):
                    objective = SupervisedObjective(config.algorithm, batch.counts, _norm(config), loss, reference)
                    row |= training.reduce(training.update(batch, objective))
                row["throughput/tokens"] = batch.num_tokens
                done = state.step + 1
                if held_out and (done == config.train.num_steps or (interval and done % interval == 0)):
                    with training.timer.phase("evaluate"):
                        row |= held_out_loss(training, held_out)
        training.finish()


def held_out_loss(training: Training, sequences: Sequence[TrainingSequence]) -> dict[str, float]:
    """Mean negative log-likelihood per response token, nats, of held-out sequences."""
    batch = training.minibatch(sequences, range(len(sequences)))
    metrics: dict[str, Metric] = {}
    name = f"eval/{training.config.evaluation.name}/loss"
    for micro_batch, (log_probs, _) in zip(
        batch.micro_batches, forward_log_probs(training.policy, batch.micro_batches), strict=True
    ):
        metrics = combine(metrics, {name: masked_mean(-log_probs, micro_batch.loss_mask)})
    return training.reduce(metrics if training.groups.reports else {})


def _norm(config: Config) -> float:
    return config.algorithm.token_sum_norm or float(config.rollout.sampling.max_response_tokens)
