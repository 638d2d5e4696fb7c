"""Reinforcement learning: the loop.

    generate -> score -> log_probs (old, reference) -> advantages -> forward_backward, optim_step -> sync_weights

Log-probs come before advantages, because a KL penalty may be part of the reward. With dynamic sampling, generation and
scoring are repeated until enough prompts have completions of different rewards (`rollouts.Collection`).
"""

from megatron_rl.config.schema import Config
from megatron_rl.parallel.groups import Groups
from megatron_rl.placement.layout import Layout
from megatron_rl.trainer.rl import RLTrainer


def train_rl(config: Config, groups: Groups, layout: Layout) -> None:
    """Run or resume a reinforcement-learning run."""
    rl = RLTrainer(config, groups, layout)
    phase = rl.training.timer.phase
    with rl.training as training:
        rl.sync_weights()
        if training.state.step == 0:
            training.record(rl.evaluate())
        while not training.is_done:
            with training.step() as row:
                collection = rl.collection()
                while count := collection.num_missing:
                    with phase("generate"):
                        prompts, completions = rl.generate(count)
                    with phase("score"):
                        collection.add(rl.score(prompts, completions))
                samples = collection.samples
                with phase("log_probs"):
                    batches = rl.log_probs(samples)
                with phase("advantages"):
                    advantages = rl.advantages(samples, batches)
                with phase("train"):
                    row |= rl.train(batches)
                with phase("sync_weights"):
                    row |= rl.sync_weights(version=training.state.step + 1)
                row |= rl.report(samples, advantages) | collection.metrics()
                if rl.evaluation_is_due():
                    row |= rl.evaluate()
        training.finish()
