"""Training of a reward model: on pairs (Bradley-Terry), on scores (regression), on steps (process rewards)."""

from collections.abc import Sequence
from functools import partial

from megatron_rl.config.schema import Config
from megatron_rl.data.preferences import Judged, Judgement
from megatron_rl.engine.scalar_model import ScalarModel
from megatron_rl.engine.step import LossFunction
from megatron_rl.parallel.groups import Groups
from megatron_rl.trainer.judgements import JudgementRecipe, load, train_on
from megatron_rl.trainer.minibatch import MiniBatch
from megatron_rl.trainer.preference_losses import REWARD_LOSSES, is_of_pairs, resolve_preference_loss
from megatron_rl.trainer.preference_objectives import RewardObjective
from megatron_rl.trainer.training import Training


def train_reward_model(config: Config, groups: Groups) -> None:
    """Run or resume the training of a reward model; it is exported as a Hugging Face classifier of one label."""
    loss = resolve_preference_loss(config.algorithm.preference, REWARD_LOSSES)
    judgements, held_out = load(config, of_pairs=is_of_pairs(loss))
    build = partial(ScalarModel, per_token="logits" in loss.wants)
    training = Training(config, groups, num_updates_per_step=1, build=build)

    def objective(chosen: Sequence[Judgement], batch: MiniBatch) -> LossFunction:
        return RewardObjective(loss, batch.counts)

    train_on(training, judgements, held_out, JudgementRecipe(Judged.to_read, objective))
