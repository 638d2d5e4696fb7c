"""Advantage estimators by name, and a user's own; from the rewards of a step to the advantages of its tokens.

    rewards of tokens   what a process reward model gave them, less the KL penalty where it is in the reward
    rewards             of whole completions; for an estimator of tokens on the last trained token of each
    estimator           of completions or of tokens
    whitening           over the trained tokens of the global batch

An estimator is a function that names what it needs. One that names `loss_mask` or `cu_seqlens` works on the tokens of
one micro-batch, [T], and returns advantages [T], or advantages and the returns that a critic is fitted to; any other
works on the completions of the whole step, [N], and returns [N]. One that names `values` gets a critic.

    of completions   rewards [N], group_ids [N], lengths [N] in tokens, baseline (a `RunningBaseline` of the steps
                     before)
    of tokens        rewards [T], values [T] of the critic, loss_mask [T], cu_seqlens [S + 1]

Each rank works on the micro-batches that it will train on. What must be known of all of them, sums of completions and
moments of tokens, is gathered.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.algorithms.advantages import (
    RunningBaseline,
    discounted_returns,
    generalized_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    whiten,
)
from megatron_rl.algorithms.aggregation import sequence_means, sequence_sums
from megatron_rl.algorithms.metrics import Moments
from megatron_rl.algorithms.reward_shaping import terminal_rewards
from megatron_rl.config.functions import Bound, Function, bind, find_function
from megatron_rl.config.schema import AdvantageConfig, Whitening
from megatron_rl.data.packing import MicroBatch
from megatron_rl.data.samples import Sample
from megatron_rl.objectives.minibatch import spread

OF_COMPLETIONS = ("rewards", "group_ids", "lengths", "baseline")
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
    "length_weighted": length_weighted_advantages,
    "leave_one_out": leave_one_out_advantages,
    "reward": reward_itself,
    "running_baseline": against_running_baseline,
    "monte_carlo": discounted_returns,
    "td0": td0,
    "gae": generalized_advantages,
}


_SETTINGS = ("normalize_by_std", "std_epsilon", "std_correction", "gamma", "lam")


def resolve_estimator(config: AdvantageConfig) -> Bound:
    """The configured estimator with its settings.

    Raises:
        UserError: an unknown name, a function that cannot be had, arguments that do not fit.
    """
    function = find_function(config.estimator, ESTIMATORS, key=f"{KEY}.estimator", what="advantage estimator")
    settings = {name: getattr(config, name) for name in _SETTINGS}
    offered = dict.fromkeys((*OF_COMPLETIONS, *OF_TOKENS))
    return bind(config.estimator, function, key=KEY, offered=tuple(offered), args=config.args, settings=settings)


def is_of_tokens(estimator: Bound) -> bool:
    """Whether it works on the tokens of a micro-batch."""
    return bool(estimator.wants & {"loss_mask", "cu_seqlens", "values"})


def needs_critic(estimator: Bound) -> bool:
    """Whether it asks for values."""
    return "values" in estimator.wants


TOKEN_REWARDS = "token_rewards"
"""Rewards of single tokens, [T], of a micro-batch that has any."""


def add_advantages(
    samples: Sequence[Sample],
    micro_batches: Sequence[MicroBatch],
    *,
    config: AdvantageConfig,
    estimator: Bound,
    baseline: RunningBaseline,
    dp: ProcessGroup,
) -> Tensor:
    """Give every micro-batch its per-token `advantages` and, if it has `values`, `returns`; collective over `dp`.

    Args:
        samples: of the whole step, the same on all ranks; a micro-batch's sequence ids are positions in them.
        micro_batches: of this data-parallel rank. Their `token_rewards`, if there, are 0 on masked tokens.
        config: settings of the estimator.
        estimator: of `resolve_estimator`.
        baseline: of the steps before.
        dp: ranks whose micro-batches make up the step.

    Returns:
        [samples] float32: each completion's advantage, the mean over its tokens.
    """
    rewards = torch.tensor([sample.terminal_reward for sample in samples], dtype=torch.float32)
    if is_of_tokens(estimator):
        for micro_batch in micro_batches:
            _estimate_tokens(micro_batch, rewards, estimator, config.gamma)
    else:
        whole = rewards
        if any(TOKEN_REWARDS in micro_batch.per_token for micro_batch in micro_batches):
            whole = rewards + gathered_sums(micro_batches, TOKEN_REWARDS, len(samples), dp)
        group_ids = torch.tensor([sample.prompt.prompt_id for sample in samples])
        lengths = torch.tensor([len(sample.completion.token_ids) for sample in samples])
        unused = dict.fromkeys(("values", "loss_mask", "cu_seqlens"))
        advantages = estimator(rewards=whole, group_ids=group_ids, lengths=lengths, baseline=baseline, **unused)
        for micro_batch in micro_batches:
            micro_batch.per_token["advantages"] = spread(micro_batch, advantages.tolist())
            if "values" in micro_batch.per_token:  # of a critic that this estimator has no use for
                micro_batch.per_token["returns"] = _returns(
                    micro_batch, _token_rewards(micro_batch, rewards), config.gamma
                )
    if config.whiten is not Whitening.none:
        _whiten(micro_batches, dp, subtract_mean=config.whiten is Whitening.full, epsilon=config.std_epsilon)
    return gathered_means(micro_batches, "advantages", len(samples), dp)


def _estimate_tokens(micro_batch: MicroBatch, rewards: Tensor, estimator: Bound, gamma: float) -> None:
    mask, cu_seqlens = micro_batch.loss_mask, micro_batch.cu_seqlens[: len(micro_batch.sequence_ids) + 1]
    of_tokens = _token_rewards(micro_batch, rewards)
    values = micro_batch.per_token.get("values")
    found = estimator(
        rewards=of_tokens,
        values=values,
        loss_mask=mask,
        cu_seqlens=cu_seqlens,
        group_ids=None,
        lengths=None,
        baseline=None,
    )
    advantages, returns = found if isinstance(found, tuple) else (found, None)
    micro_batch.per_token["advantages"] = torch.where(mask > 0, advantages, 0.0)
    if values is not None:
        if returns is None:
            returns = _returns(micro_batch, of_tokens, gamma)
        micro_batch.per_token["returns"] = returns


def _token_rewards(micro_batch: MicroBatch, rewards: Tensor) -> Tensor:
    """[T]: the rewards of completions on their last trained tokens, and those of single tokens."""
    cu_seqlens = micro_batch.cu_seqlens[: len(micro_batch.sequence_ids) + 1]
    of_tokens = terminal_rewards(rewards[list(micro_batch.sequence_ids)], micro_batch.loss_mask, cu_seqlens)
    return of_tokens + micro_batch.per_token[TOKEN_REWARDS] if TOKEN_REWARDS in micro_batch.per_token else of_tokens


def _returns(micro_batch: MicroBatch, of_tokens: Tensor, gamma: float) -> Tensor:
    cu_seqlens = micro_batch.cu_seqlens[: len(micro_batch.sequence_ids) + 1]
    return discounted_returns(of_tokens, micro_batch.loss_mask, cu_seqlens, gamma=gamma)


def _whiten(micro_batches: Sequence[MicroBatch], dp: ProcessGroup, *, subtract_mean: bool, epsilon: float) -> None:
    mine = sum(
        (Moments.of(micro_batch.per_token["advantages"], micro_batch.loss_mask) for micro_batch in micro_batches),
        Moments(),
    )
    of_ranks: list[Moments] = [Moments()] * dp.size()
    dist.all_gather_object(of_ranks, mine, group=dp)
    moments = sum(of_ranks, Moments())
    for micro_batch in micro_batches:
        micro_batch.per_token["advantages"] = whiten(
            micro_batch.per_token["advantages"],
            micro_batch.loss_mask,
            moments,
            subtract_mean=subtract_mean,
            epsilon=epsilon,
        )


def gathered_sums(micro_batches: Sequence[MicroBatch], name: str, num_samples: int, dp: ProcessGroup) -> Tensor:
    """[samples] float32: the sum of a per-token value over each completion's trained tokens, from all ranks."""
    sums: dict[int, float] = {}
    for micro_batch in micro_batches:
        of_micro_batch = sequence_sums(
            micro_batch.per_token[name], micro_batch.loss_mask, micro_batch.cu_seqlens
        ).tolist()
        sums |= dict(
            zip(micro_batch.sequence_ids, of_micro_batch, strict=False)
        )  # the padding comes last and has no id
    return _gathered(sums, num_samples, dp)


def gathered_means(micro_batches: Sequence[MicroBatch], name: str, num_samples: int, dp: ProcessGroup) -> Tensor:
    """As `gathered_sums`, of the mean."""
    means: dict[int, float] = {}
    for micro_batch in micro_batches:
        of_micro_batch = sequence_means(
            micro_batch.per_token[name], micro_batch.loss_mask, micro_batch.cu_seqlens
        ).tolist()
        means |= dict(zip(micro_batch.sequence_ids, of_micro_batch, strict=False))
    return _gathered(means, num_samples, dp)


def _gathered(mine: Mapping[int, float], num_samples: int, dp: ProcessGroup) -> Tensor:
    of_ranks: list[Mapping[int, float]] = [{}] * dp.size()
    dist.all_gather_object(of_ranks, mine, group=dp)
    everyone = {i: value for of_rank in of_ranks for i, value in of_rank.items()}
    return torch.tensor([everyone[i] for i in range(num_samples)], dtype=torch.float32)
