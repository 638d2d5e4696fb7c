"""All functions and names that a configuration chooses, found before there is anything to join."""

from megatron_rl.config.errors import refuse
from megatron_rl.config.functions import nearest
from megatron_rl.config.schema import Config, Recipe
from megatron_rl.objectives.advantages import resolve_estimator
from megatron_rl.objectives.losses import (
    POLICY_LOSSES,
    REWARD_LOSSES,
    resolve_policy_loss,
    resolve_preference_loss,
    resolve_supervised_loss,
)
from megatron_rl.rewards.scoring import BoundReward, resolve_rewards


def resolve_choices(config: Config) -> list[BoundReward]:
    """Find the functions that the configuration names; return the rewards.

    Raises:
        UserError: one that cannot be had, arguments that do not fit, a reward that is named and not there.
    """
    algorithm = config.algorithm
    if config.recipe is Recipe.sft:
        resolve_supervised_loss(algorithm.supervised)
    if config.recipe is Recipe.rl:
        resolve_estimator(algorithm.advantage)
        resolve_policy_loss(algorithm.policy_loss)
    if config.recipe is Recipe.preference:
        resolve_preference_loss(algorithm.preference, POLICY_LOSSES)
    if config.recipe is Recipe.reward_model:
        resolve_preference_loss(algorithm.preference, REWARD_LOSSES)
    rewards = resolve_rewards(config.rewards)
    names = [reward.name for reward in rewards]
    for key, name in (
        ("evaluation.correct_reward", config.evaluation.correct_reward),
        ("algorithm.dynamic_sampling.reward", algorithm.dynamic_sampling.reward),
    ):
        if name is not None and name not in names:
            refuse(key, name, f"a reward of rewards.functions{nearest(name, names)}")
    return rewards
