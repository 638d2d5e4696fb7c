"""The named policy-gradient algorithms on a tabular policy: sample, estimate advantages, update."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import (
    RunningBaseline,
    generalized_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    whiten,
)
from megatron_rl.algorithms.metrics import Moments
from megatron_rl.algorithms.policy_loss import (
    cispo_loss,
    gspo_loss,
    importance_weighted_loss,
    ppo_clip_loss,
    ppo_trajectory_loss,
    reinforce_loss,
)
from megatron_rl.algorithms.reward_shaping import terminal_rewards
from megatron_rl.algorithms.value_loss import clipped_value_loss, value_loss
from tests.theory.tabular import TokenMDP, mean_loss, packed


@dataclass
class Learner:
    """One algorithm: how it gets advantages, and what it minimises."""

    loss: Callable[..., Tensor]
    by_sequence: bool = False
    group: Callable[[Tensor, Tensor], Tensor] | None = None
    """(rewards, group ids) -> advantages of completions."""
    running: bool = False
    """A running baseline instead of a group's."""
    whitened: bool = False
    critic_lambda: float | None = None
    """GAE with a critic of one value per prefix."""
    value_clip: float | None = None
    epochs: int = 1
    """Updates on each batch."""
    baseline: RunningBaseline = field(default_factory=RunningBaseline)


CLIP: Any = {"clip_low": 0.2, "clip_high": 0.2}
ppo = partial(ppo_clip_loss, **CLIP, dual_clip=None)
grpo_advantages = partial(group_relative_advantages, normalize_by_std=True, std_epsilon=1e-6)
dr_grpo_advantages = partial(group_relative_advantages, normalize_by_std=False, std_epsilon=0.0)


def on_policy(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE in the signature of the others."""
    return reinforce_loss(log_probs, advantages)


ALGORITHMS: dict[str, Callable[[], Learner]] = {
    "reinforce": lambda: Learner(on_policy, running=True),
    "reinforce_batch_normalised": lambda: Learner(on_policy, whitened=True),
    "reinforce++": lambda: Learner(ppo, whitened=True, epochs=2),
    "reinforce++_baseline": lambda: Learner(ppo, group=dr_grpo_advantages, whitened=True, epochs=2),
    "rloo": lambda: Learner(on_policy, group=leave_one_out_advantages),
    "a2c": lambda: Learner(on_policy, critic_lambda=0.0),
    "ppo": lambda: Learner(ppo, critic_lambda=0.95, value_clip=0.2, whitened=True, epochs=4),
    "ppo_trajectory": lambda: Learner(
        partial(ppo_trajectory_loss, **CLIP), by_sequence=True, group=grpo_advantages, epochs=4
    ),
    "grpo": lambda: Learner(ppo, group=grpo_advantages, epochs=4),
    "dr_grpo": lambda: Learner(ppo, group=dr_grpo_advantages, epochs=4),
    "dapo": lambda: Learner(
        partial(ppo_clip_loss, clip_low=0.2, clip_high=0.28, dual_clip=None), group=grpo_advantages, epochs=4
    ),
    "gspo": lambda: Learner(partial(gspo_loss, **CLIP), by_sequence=True, group=grpo_advantages, epochs=4),
    "cispo": lambda: Learner(partial(cispo_loss, clip_low=1.0, clip_high=0.28), group=grpo_advantages, epochs=4),
    # A2C that reuses its batch like PPO, with PPO's advantages: what is left between the two is the clip.
    "a2c_unclipped": lambda: Learner(importance_weighted_loss, critic_lambda=0.95, whitened=True, epochs=4),
}


def update(
    mdp: TokenMDP,
    learner: Learner,
    logits: Tensor,
    values: Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    *,
    batch: int,
    group_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """One rollout of `batch` completions and its updates of logits and values.

    Returns:
        the batch's token log-probs before and after, [batch, L].
    """
    which = mdp.sample(logits, batch, generator)
    mask, cu_seqlens = packed(batch, mdp.length)
    old = mdp.token_log_probs(logits, which).detach().flatten()
    states = mdp.states[which].flatten()
    old_values = values.detach()[states]
    advantages, returns = _advantages(mdp, learner, mdp.rewards[which], old_values, group_size)
    for _ in range(learner.epochs):
        optimizer.zero_grad()
        whole = {"loss_mask": mask, "cu_seqlens": cu_seqlens} if learner.by_sequence else {}
        log_probs = mdp.token_log_probs(logits, which).flatten()
        loss = mean_loss(learner.loss(log_probs, old, advantages, **whole), mdp.length, "sequence_mean_token_mean")
        if returns is not None:
            now = values[states]
            if learner.value_clip is None:
                loss = loss + value_loss(now, returns).mean()
            else:
                loss = loss + clipped_value_loss(now, old_values, returns, clip=learner.value_clip).mean()
        loss.backward()
        optimizer.step()
    after = mdp.token_log_probs(logits, which).detach()
    return old.reshape(batch, -1), after


def _advantages(
    mdp: TokenMDP, learner: Learner, rewards: Tensor, values: Tensor, group_size: int
) -> tuple[Tensor, Tensor | None]:
    """Per token, and, with a critic, the returns that it is fitted to."""
    batch = len(rewards)
    mask, cu_seqlens = packed(batch, mdp.length)
    returns = None
    if learner.critic_lambda is not None:
        advantages, returns = generalized_advantages(
            terminal_rewards(rewards, mask, cu_seqlens), values, mask, cu_seqlens, gamma=1.0, lam=learner.critic_lambda
        )
        returns = returns.double()
    else:
        of_completions = rewards
        if learner.group is not None:
            of_completions = learner.group(rewards.float(), torch.arange(batch) // group_size)
        if learner.running:
            of_completions = learner.baseline.advantages(rewards)
            learner.baseline = learner.baseline.after(float(rewards.sum()), batch, decay=0.9)
        advantages = of_completions[:, None].expand(-1, mdp.length).flatten()
    if learner.whitened:
        advantages = whiten(advantages, mask, Moments.of(advantages, mask), epsilon=1e-6)
    return advantages.double(), returns
