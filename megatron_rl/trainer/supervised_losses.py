"""Losses of supervised fine-tuning by name, and the user's own: functions of what they name, one loss per token:

    log_probs        [n] of the target tokens
    mean_log_probs   [n] mean of all log-probs at each position

A loss sees tokens apart from each other, in pieces of a row: its gradient can then be formed while the head computes.
"""

from megatron_rl.algorithms.supervised_loss import focal_loss, label_smoothed_loss, sft_loss
from megatron_rl.config.functions import Bound, Function, bind, find_function
from megatron_rl.config.schema import SupervisedConfig

KEY = "algorithm.supervised"
SFT = Bound("sft", sft_loss, frozenset({"log_probs"}), {})
LOSSES: dict[str, Function] = {"sft": sft_loss, "focal": focal_loss, "label_smoothed": label_smoothed_loss}


def resolve_supervised_loss(config: SupervisedConfig) -> Bound:
    """The configured loss with its arguments.

    Raises:
        UserError: an unknown name, a function that cannot be had, arguments that do not fit.
    """
    function = find_function(config.loss, LOSSES, key=f"{KEY}.loss", what="supervised loss")
    return bind(config.loss, function, key=KEY, offered=("log_probs", "mean_log_probs"), args=config.args)
