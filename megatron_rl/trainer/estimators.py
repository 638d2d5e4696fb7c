"""Advantage estimators by name, and the user's own.

An estimator is a function that names what it needs. One that names `loss_mask` or `cu_seqlens` works on the tokens of
one packed row, [T], and returns advantages [T], or advantages and the returns that a critic is fitted to; any other
works on the completions of the whole step, [N], and returns [N].

    of completions   rewards [N], group_ids [N], baseline (a `RunningBaseline` of the steps before)
    of tokens        rewards [T], values [T] of the critic, loss_mask [T], cu_seqlens [S + 1]

One that names `values` gets a critic.
"""

from torch import Tensor

from megatron_rl.algorithms.advantages import RunningBaseline, group_relative_advantages, leave_one_out_advantages
from megatron_rl.algorithms.gae import discounted_returns, generalized_advantages
from megatron_rl.config.functions import Bound, Function, bind, find_function
from megatron_rl.config.schema import AdvantageConfig

OF_COMPLETIONS = ("rewards", "group_ids", "baseline")
OF_TOKENS = ("rewards", "values", "loss_mask", "cu_seqlens")
KEY = "algorithm.advantage"


def reward_itself(rewards: Tensor) -> Tensor:
    """REINFORCE without a baseline: A_i = r_i; [N]."""
    return rewards


def against_running_baseline(rewards: Tensor, baseline: RunningBaseline) -> Tensor:
    """REINFORCE with the mean reward of the steps before as its baseline; [N]."""
    return baseline.advantages(rewards)


def td0(
    rewards: Tensor, values: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, *, gamma: float
) -> tuple[Tensor, Tensor]:
    """One-step advantages r_t + gamma V_{t+1} - V_t, of A2C: `generalized_advantages` at lambda 0."""
    return generalized_advantages(rewards, values, loss_mask, cu_seqlens, gamma=gamma, lam=0.0)


ESTIMATORS: dict[str, Function] = {
    "group_relative": group_relative_advantages,
    "leave_one_out": leave_one_out_advantages,
    "reward": reward_itself,
    "running_baseline": against_running_baseline,
    "monte_carlo": discounted_returns,
    "td0": td0,
    "gae": generalized_advantages,
}


def resolve_estimator(config: AdvantageConfig) -> Bound:
    """The configured estimator with its settings.

    Raises:
        UserError: an unknown name, a function that cannot be had, arguments that do not fit.
    """
    function = find_function(config.estimator, ESTIMATORS, key=f"{KEY}.estimator", what="advantage estimator")
    settings = {name: getattr(config, name) for name in ("normalize_by_std", "std_epsilon", "gamma", "lam")}
    offered = dict.fromkeys((*OF_COMPLETIONS, *OF_TOKENS))
    return bind(config.estimator, function, key=KEY, offered=tuple(offered), args=config.args, settings=settings)


def is_of_tokens(estimator: Bound) -> bool:
    """Whether it works on the tokens of a row."""
    return bool(estimator.wants & {"loss_mask", "cu_seqlens", "values"})


def needs_critic(estimator: Bound) -> bool:
    """Whether it asks for values."""
    return "values" in estimator.wants
