"""Losses on judged completions by name, and the user's own.

A loss is a function of what it names, over the pairs or the single completions of one packed row, and returns one loss
for each. What it names decides what data it is given:

    chosen, rejected, ref_chosen, ref_rejected   [P], of pairs: log-probs of policy and reference, or, without the
                                                 reference, scores of a reward model
    margin                                       [P], of pairs, from data.margin_key
    log_probs, ref_log_probs, desirable          [N], of single completions with a label
    reference_kl                                 of the global batch, for KTO
    rewards, targets                             [N], scores of a reward model and of the data
    logits, labels                               [T], at the ends of the steps, for a process reward model
"""

from megatron_rl.algorithms.preference_loss import dpo_loss, hinge_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from megatron_rl.algorithms.reward_model_loss import (
    bradley_terry_loss,
    process_reward_loss,
    reward_regression_loss,
)
from megatron_rl.config.functions import Bound, Function, bind, find_function
from megatron_rl.config.schema import PreferenceConfig

OF_PAIRS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "margin")
OF_SINGLE = ("log_probs", "ref_log_probs", "desirable", "reference_kl", "rewards", "targets")
OF_STEPS = ("logits", "labels")
KEY = "algorithm.preference"

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
    function = find_function(config.loss, built_ins, key=f"{KEY}.loss", what="loss of this recipe")
    settings = {"beta": config.beta, "tau": config.beta, "label_smoothing": config.label_smoothing}
    offered = (*OF_PAIRS, *OF_SINGLE, *OF_STEPS)
    return bind(config.loss, function, key=KEY, offered=offered, args=config.args, settings=settings)


def is_of_pairs(loss: Bound) -> bool:
    """Whether it compares two completions of a prompt."""
    return "chosen" in loss.wants


def needs_reference(loss: Bound) -> bool:
    """Whether it compares with a reference policy."""
    return bool(loss.wants & {"ref_chosen", "ref_log_probs", "reference_kl"})
