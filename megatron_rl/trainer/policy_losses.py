"""Policy losses by name, and the user's own.

A loss is a function of one packed row that names what it needs and returns [T], one loss per token, before mask and
division:

    log_probs        [T] of the policy, with its gradient        advantages      [T]
    old_log_probs    [T] of the policy before the step's first update
    rollout_log_probs, ref_log_probs (with a reference policy)   [T]
    entropy          [T], with its gradient                      loss_mask [T], cu_seqlens [S + 1]

Beside each loss stand the metrics that describe the same tokens; a loss of one's own gets those of the ratio.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_rl.algorithms.importance import Level, log_ratios
from megatron_rl.algorithms.metrics import Metric
from megatron_rl.algorithms.policy_gradient_loss import (
    cispo_loss,
    cispo_metrics,
    importance_weighted_loss,
    reinforce_loss,
)
from megatron_rl.algorithms.policy_loss import ppo_clip_loss, ppo_clip_metrics
from megatron_rl.algorithms.sequence_policy_loss import gspo_loss, gspo_token_loss, ppo_trajectory_loss
from megatron_rl.config.functions import Bound, Function, bind, find_function
from megatron_rl.config.schema import PolicyLossConfig

OFFERED = (
    "log_probs",
    "old_log_probs",
    "advantages",
    "rollout_log_probs",
    "ref_log_probs",
    "entropy",
    "loss_mask",
    "cu_seqlens",
)
KEY = "algorithm.policy_loss"

LOSSES: dict[str, Function] = {
    "ppo_clip": ppo_clip_loss,
    "ppo_trajectory": ppo_trajectory_loss,
    "gspo": gspo_loss,
    "gspo_token": gspo_token_loss,
    "cispo": cispo_loss,
    "importance_weighted": importance_weighted_loss,
    "reinforce": reinforce_loss,
}

TOKEN_LOSSES = ("ppo_clip", "cispo", "importance_weighted", "reinforce")
"""Those in which a token's loss depends on that token alone; the head differentiates them in its forward pass."""

LossMetrics = Callable[[PolicyLossConfig, dict[str, Any]], dict[str, Metric]]


def resolve_policy_loss(config: PolicyLossConfig) -> Bound:
    """The configured loss with its settings.

    Raises:
        UserError: an unknown name, a function that cannot be had, arguments that do not fit.
    """
    function = find_function(config.name, LOSSES, key=f"{KEY}.name", what="policy loss")
    settings = {name: getattr(config, name) for name in ("clip_low", "clip_high", "dual_clip")}
    return bind(config.name, function, key=KEY, offered=OFFERED, args=config.args, settings=settings)


def loss_metrics(config: PolicyLossConfig, row: dict[str, Any]) -> dict[str, Metric]:
    """How far the policy moved, and what the configured loss did about it.

    Args:
        row: the values of `OFFERED`.
    """
    return _METRICS.get(config.name, _of_unclipped)(config, row)


def _of_tokens(config: PolicyLossConfig, row: dict[str, Any]) -> dict[str, Metric]:
    return _clip_metrics(config, row, row["log_probs"], row["old_log_probs"])


def _of_completions(config: PolicyLossConfig, row: dict[str, Any]) -> dict[str, Metric]:
    level: Level = "sequence" if config.name == "ppo_trajectory" else "geometric"
    ratios = log_ratios(
        row["log_probs"].detach(), row["old_log_probs"], row["loss_mask"], row["cu_seqlens"], level=level
    )
    return _clip_metrics(config, row, ratios, ratios.new_zeros(ratios.shape))


def _clip_metrics(config: PolicyLossConfig, row: dict[str, Any], new: Tensor, old: Tensor) -> dict[str, Metric]:
    return ppo_clip_metrics(
        new,
        old,
        row["advantages"],
        row["loss_mask"],
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )


def _of_unclipped(config: PolicyLossConfig, row: dict[str, Any]) -> dict[str, Metric]:
    found = _of_tokens(config, row)
    return {name: metric for name, metric in found.items() if not name.startswith("policy/clip_fraction")}


def _of_cispo(config: PolicyLossConfig, row: dict[str, Any]) -> dict[str, Metric]:
    bounds = dict(clip_low=config.clip_low, clip_high=config.clip_high)
    found = cispo_metrics(row["log_probs"], row["old_log_probs"], row["loss_mask"], **bounds)
    return _of_unclipped(config, row) | found


_METRICS: dict[str, LossMetrics] = {
    "ppo_clip": _of_tokens,
    "ppo_trajectory": _of_completions,
    "gspo": _of_completions,
    "gspo_token": _of_completions,
    "cispo": _of_cispo,
}
