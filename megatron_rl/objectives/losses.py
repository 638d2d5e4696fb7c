"""Losses by name, and a user's own: of policies, on preference data, and of supervised fine-tuning.

A loss is a function that names what it needs of one micro-batch, and gets no more. What each kind is offered:

Policy losses, one loss per token, [T], before mask and division. Beside each stand the metrics that describe the same
tokens; a loss of one's own gets those of the ratio.

    log_probs        [T] of the policy, with its gradient        advantages      [T]
    old_log_probs    [T] of the policy before the step's first update
    rollout_log_probs, ref_log_probs (with a reference policy)   [T]
    entropy          [T], with its gradient                      loss_mask [T], cu_seqlens [S + 1]

Losses on preference data, one loss per pair or single completion. What one names decides what data it is given.

    chosen, rejected, ref_chosen, ref_rejected   [P], of pairs: log-probs of policy and reference, or, without the
                                                 reference, scores of a reward model
    margin                                       [P], of pairs, from data.margin_key
    log_probs, ref_log_probs, desirable          [N], of single completions with a label
    reference_kl                                 of the global batch, for KTO
    rewards, targets                             [N], scores of a reward model and of the data
    logits, labels                               [T], at the ends of the steps, for a process reward model

Losses of supervised fine-tuning, one loss per token. They see tokens apart from each other, in pieces of a micro-batch:
the gradient can then be formed while the head computes.

    log_probs        [n] of the target tokens
    mean_log_probs   [n] mean of all log-probs at each position
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_rl.algorithms.importance import Level, log_ratios
from megatron_rl.algorithms.metrics import Metric
from megatron_rl.algorithms.policy_loss import (
    cispo_loss,
    cispo_metrics,
    gspo_loss,
    gspo_token_loss,
    importance_weighted_loss,
    ppo_clip_loss,
    ppo_clip_metrics,
    ppo_trajectory_loss,
    reinforce_loss,
)
from megatron_rl.algorithms.preference_loss import (
    bradley_terry_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    process_reward_loss,
    reward_regression_loss,
    simpo_loss,
)
from megatron_rl.algorithms.supervised_loss import focal_loss, label_smoothed_loss, sft_loss
from megatron_rl.config.functions import Bound, Function, bind, find_function
from megatron_rl.config.schema import PolicyLossConfig, PreferenceConfig, SupervisedConfig

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
POLICY_LOSS_KEY = "algorithm.policy_loss"

POLICY_GRADIENT_LOSSES: dict[str, Function] = {
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
    function = find_function(config.name, POLICY_GRADIENT_LOSSES, key=f"{POLICY_LOSS_KEY}.name", what="policy loss")
    settings = {name: getattr(config, name) for name in ("clip_low", "clip_high", "dual_clip")}
    return bind(config.name, function, key=POLICY_LOSS_KEY, offered=OFFERED, args=config.args, settings=settings)


def loss_metrics(config: PolicyLossConfig, values: dict[str, Any]) -> dict[str, Metric]:
    """How far the policy moved, and what the configured loss did about it.

    Args:
        values: the values of `OFFERED`.
    """
    return _METRICS.get(config.name, _of_unclipped)(config, values)


def _of_tokens(config: PolicyLossConfig, values: dict[str, Any]) -> dict[str, Metric]:
    return _clip_metrics(config, values, values["log_probs"], values["old_log_probs"])


def _of_completions(config: PolicyLossConfig, values: dict[str, Any]) -> dict[str, Metric]:
    level: Level = "sequence" if config.name == "ppo_trajectory" else "geometric"
    ratios = log_ratios(
        values["log_probs"].detach(), values["old_log_probs"], values["loss_mask"], values["cu_seqlens"], level=level
    )
    return _clip_metrics(config, values, ratios, ratios.new_zeros(ratios.shape))


def _clip_metrics(config: PolicyLossConfig, values: dict[str, Any], new: Tensor, old: Tensor) -> dict[str, Metric]:
    return ppo_clip_metrics(
        new,
        old,
        values["advantages"],
        values["loss_mask"],
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )


def _of_unclipped(config: PolicyLossConfig, values: dict[str, Any]) -> dict[str, Metric]:
    found = _of_tokens(config, values)
    return {name: metric for name, metric in found.items() if not name.startswith("policy/clip_fraction")}


def _of_cispo(config: PolicyLossConfig, values: dict[str, Any]) -> dict[str, Metric]:
    bounds = dict(clip_low=config.clip_low, clip_high=config.clip_high)
    found = cispo_metrics(values["log_probs"], values["old_log_probs"], values["loss_mask"], **bounds)
    return _of_unclipped(config, values) | found


_METRICS: dict[str, LossMetrics] = {
    "ppo_clip": _of_tokens,
    "ppo_trajectory": _of_completions,
    "gspo": _of_completions,
    "gspo_token": _of_completions,
    "cispo": _of_cispo,
}


OF_PAIRS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "margin")
OF_SINGLE = ("log_probs", "ref_log_probs", "desirable", "reference_kl", "rewards", "targets")
OF_STEPS = ("logits", "labels")
PREFERENCE_LOSS_KEY = "algorithm.preference"

POLICY_LOSSES: dict[str, Function] = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "kto": kto_loss,
}
REWARD_LOSSES: dict[str, Function] = {
    "bradley_terry": bradley_terry_loss,
    "regression": reward_regression_loss,
    "process": process_reward_loss,
}
OF_MEANS = ("simpo", "orpo")
"""Losses that are defined on the mean log-prob of a completion's tokens."""


def resolve_preference_loss(config: PreferenceConfig, built_ins: dict[str, Function]) -> Bound:
    """The configured loss with its settings.

    Args:
        built_ins: `POLICY_LOSSES` or `REWARD_LOSSES`.

    Raises:
        UserError: an unknown name, a function that cannot be had, arguments that do not fit.
    """
    function = find_function(config.loss, built_ins, key=f"{PREFERENCE_LOSS_KEY}.loss", what="loss of this recipe")
    settings = {"beta": config.beta, "tau": config.beta, "label_smoothing": config.label_smoothing}
    offered = (*OF_PAIRS, *OF_SINGLE, *OF_STEPS)
    return bind(config.loss, function, key=PREFERENCE_LOSS_KEY, offered=offered, args=config.args, settings=settings)


def is_of_pairs(loss: Bound) -> bool:
    """Whether it compares two completions of a prompt."""
    return "chosen" in loss.wants


def needs_reference(loss: Bound) -> bool:
    """Whether it compares with a reference policy."""
    return bool(loss.wants & {"ref_chosen", "ref_log_probs", "reference_kl"})


SUPERVISED_LOSS_KEY = "algorithm.supervised"
SFT = Bound("sft", sft_loss, frozenset({"log_probs"}), {})
SUPERVISED_LOSSES: dict[str, Function] = {"sft": sft_loss, "focal": focal_loss, "label_smoothed": label_smoothed_loss}


def resolve_supervised_loss(config: SupervisedConfig) -> Bound:
    """The configured loss with its arguments.

    Raises:
        UserError: an unknown name, a function that cannot be had, arguments that do not fit.
    """
    function = find_function(config.loss, SUPERVISED_LOSSES, key=f"{SUPERVISED_LOSS_KEY}.loss", what="supervised loss")
    return bind(
        config.loss, function, key=SUPERVISED_LOSS_KEY, offered=("log_probs", "mean_log_probs"), args=config.args
    )
