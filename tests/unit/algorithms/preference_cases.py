"""Cases of the supervised losses, of preferences, of reward models. A "token" is a token, a pair or a completion."""

import math

import torch
from torch.nn.functional import logsigmoid

from megatron_rl.algorithms import preference_loss as pl
from megatron_rl.algorithms.preference_loss import bradley_terry_loss, process_reward_loss, reward_regression_loss
from megatron_rl.algorithms.supervised_loss import focal_loss, label_smoothed_loss, sft_loss
from tests.unit.algorithms.loss_case import Case

LN = math.log
DOWN = 1 / (1 + math.exp(0.5))  # sigmoid(-0.5) = 0.3775
UP = 1 - DOWN  # sigmoid(0.5) = 0.6225
SOFT = LN(1 + math.exp(-0.5))  # -log sigmoid(0.5) = 0.4741

SUPERVISED_CASES = [
    Case(
        "sft",
        sft_loss,
        {"log_probs": "log_prob"},
        ("log_probs",),
        {"log_probs": [-1.5, -0.25], "loss": [1.5, 0.25], "d_log_probs": [-1.0, -1.0]},
        {"likelihood": lambda log_probs: -log_probs.exp(), "sign": lambda log_probs: log_probs},
    ),
    Case(
        "label_smoothed",
        label_smoothed_loss,
        {"log_probs": "log_prob", "mean_log_probs": "log_prob"},
        ("log_probs", "mean_log_probs"),
        # 0.9 * 1 + 0.1 * 3
        {
            "log_probs": [-1.0],
            "mean_log_probs": [-3.0],
            "loss": [1.2],
            "d_log_probs": [-0.9],
            "d_mean_log_probs": [-0.1],
        },
        {"not taken off": lambda log_probs, mean_log_probs, smoothing: -log_probs - smoothing * mean_log_probs},
        {"smoothing": 0.1},
    ),
    Case(
        "focal",
        focal_loss,
        {"log_probs": "log_prob"},
        ("log_probs",),
        # p = 1/2: 0.25 * (1/2)^2 ln 2; gradient alpha (gamma p (1 - p)^(gamma - 1) log p - (1 - p)^gamma)
        {
            "log_probs": [LN(0.5)],
            "loss": [LN(2) / 16],
            "d_log_probs": [0.25 * (2 * 0.5 * 0.5 * LN(0.5) - 0.25)],
        },
        {
            "p for 1 - p": lambda log_probs, gamma, alpha: -alpha * log_probs.exp() ** (gamma + 1) * log_probs,
            "weight without gradient": lambda log_probs, gamma, alpha: (
                -alpha * ((1 - log_probs.exp()) ** gamma).detach() * log_probs
            ),
        },
        {"gamma": 2.0, "alpha": 0.25},
    ),
]

PAIR = {"chosen": "log_prob", "rejected": "log_prob"}
WITH_REFERENCE = {**PAIR, "ref_chosen": "log_prob", "ref_rejected": "log_prob"}
# margins (0.5 + 0.5) = 1, 0 (the policy is the reference), and -1
PAIRS = {
    "chosen": [-1.0, -3.0, -2.0],
    "rejected": [-2.0, -4.0, -1.0],
    "ref_chosen": [-1.5, -3.0, -1.5],
    "ref_rejected": [-1.5, -4.0, -1.5],
}


def _margin(chosen, rejected, ref_chosen, ref_rejected):
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _pair(loss, gradient):
    """Columns of a loss whose gradients by chosen and rejected are opposite."""
    return {"loss": loss, "d_chosen": gradient, "d_rejected": [-value for value in gradient]}


MARGIN_CASES = [
    Case(
        "dpo",
        pl.dpo_loss,
        WITH_REFERENCE,
        ("chosen", "rejected"),
        # beta m = 0.5, 0, -0.5: -log sigmoid, and gradient -beta sigmoid(-beta m)
        {**PAIRS, **_pair([SOFT, LN(2), SOFT + 0.5], [-0.5 * DOWN, -0.25, -0.5 * UP])},
        {
            "no reference": lambda chosen, rejected, ref_chosen, ref_rejected, beta: (
                -logsigmoid(beta * (chosen - rejected))
            ),
            "swapped": lambda chosen, rejected, ref_chosen, ref_rejected, beta: pl.dpo_loss(
                rejected, chosen, ref_rejected, ref_chosen, beta=beta
            ),
            # a printed gradient: beta sigmoid(+beta m)
            "weight of the settled": lambda beta, **pair: (
                -beta * (beta * _margin(**pair)).sigmoid().detach() * _margin(**pair)
            ),
        },
        {"beta": 0.5},
    ),
    Case(
        "dpo_smoothed",
        pl.dpo_loss,
        WITH_REFERENCE,
        ("chosen", "rejected"),
        # 0.9 * SOFT + 0.1 * (SOFT + 0.5), and so on; gradient -beta (0.9 sigmoid(-beta m) - 0.1 sigmoid(beta m))
        {
            **PAIRS,
            **_pair(
                [SOFT + 0.05, LN(2), SOFT + 0.45],
                [-0.5 * (0.9 * DOWN - 0.1 * UP), -0.2, -0.5 * (0.9 * UP - 0.1 * DOWN)],
            ),
        },
        {"one side": lambda label_smoothing, **pair: (1 - label_smoothing) * pl.dpo_loss(**pair)},
        {"beta": 0.5, "label_smoothing": 0.1},
    ),
    Case(
        "ipo",
        pl.ipo_loss,
        WITH_REFERENCE,
        ("chosen", "rejected"),
        # 1 / (2 tau) = 2: (m - 2)^2 = 1, 4, 9; gradient 2 (m - 2)
        {**PAIRS, **_pair([1.0, 4.0, 9.0], [-2.0, -4.0, -6.0])},
        {
            "tau / 2": lambda tau, **pair: (_margin(**pair) - tau / 2).square(),
            "half": lambda tau, **pair: (_margin(**pair) - 1 / (2 * tau)).square() / 2,
        },
        {"tau": 0.25},
    ),
    Case(
        "hinge",
        pl.hinge_loss,
        WITH_REFERENCE,
        ("chosen", "rejected"),
        # 1 - 2 m = -1 -> 0, 1, 3
        {**PAIRS, **_pair([0.0, 1.0, 3.0], [0.0, -2.0, -2.0])},
        {"no hinge": lambda beta, **pair: 1 - beta * _margin(**pair)},
        {"beta": 2.0},
    ),
    Case(
        "simpo",
        pl.simpo_loss,
        PAIR,
        ("chosen", "rejected"),
        # 2 * 0.5 - 0.5 = 0.5; 2 * 0.25 - 0.5 = 0
        {"chosen": [-0.5, -1.0], "rejected": [-1.0, -1.25], **_pair([SOFT, LN(2)], [-2 * DOWN, -1.0])},
        {
            "margin added": lambda chosen, rejected, beta, gamma: -logsigmoid(beta * (chosen - rejected) + gamma),
            "margin scaled": lambda chosen, rejected, beta, gamma: -logsigmoid(beta * (chosen - rejected - gamma)),
        },
        {"beta": 2.0, "gamma": 0.5},
    ),
    Case(
        "orpo",
        pl.orpo_loss,
        PAIR,
        ("chosen", "rejected"),
        # p = 1/2 and 1/4: odds 1 and 1/3; -log sigmoid(ln 3) = ln(4/3), sigmoid(-ln 3) = 1/4; do/da = 1 / (1 - p)
        {
            "chosen": [LN(0.5)],
            "rejected": [LN(0.25)],
            "loss": [LN(2) + 0.1 * LN(4 / 3)],
            "d_chosen": [-1 - 0.1 * 0.25 * 2],
            "d_rejected": [0.1 * 0.25 * 4 / 3],
        },
        {
            "ratio of probabilities": lambda chosen, rejected, odds_coefficient: (
                -chosen - odds_coefficient * logsigmoid(chosen - rejected)
            ),
            "no likelihood": lambda chosen, rejected, odds_coefficient: (
                pl.orpo_loss(chosen, rejected, odds_coefficient=odds_coefficient) + chosen
            ),
        },
        {"odds_coefficient": 0.1},
    ),
    Case(
        "kto",
        pl.kto_loss,
        {"log_probs": "log_prob", "ref_log_probs": "log_prob", "desirable": "bool"},
        ("log_probs",),
        # h - z = 1.2 - 0.2 = 1, gain 0.5: 1 - sigmoid(0.5); undesirable: 2 (1 - sigmoid(-0.5)); slope beta s (1 - s)
        {
            "log_probs": [-1.0, -1.0],
            "ref_log_probs": [-2.2, -2.2],
            "desirable": [1.0, 0.0],
            "loss": [DOWN, 2 * UP],
            "d_log_probs": [-0.5 * UP * DOWN, UP * DOWN],
        },
        {
            "no reference point": lambda reference_kl, **rest: pl.kto_loss(reference_kl=0.0, **rest),
            "kinds swapped": lambda desirable, **rest: pl.kto_loss(desirable=~desirable, **rest),
            "logarithm": lambda log_probs, ref_log_probs, desirable, reference_kl, beta, undesirable_weight: (
                -logsigmoid(beta * (log_probs - ref_log_probs - reference_kl) * torch.where(desirable, 1.0, -1.0))
            ),
        },
        {"reference_kl": 0.2, "beta": 0.5, "undesirable_weight": 2.0},
    ),
]

REWARD_CASES = [
    Case(
        "bradley_terry",
        bradley_terry_loss,
        {"chosen": "real", "rejected": "real"},
        ("chosen", "rejected"),
        # differences 0.5, 0, -0.5
        {
            "chosen": [1.0, 2.0, 0.0],
            "rejected": [0.5, 2.0, 0.5],
            **_pair([SOFT, LN(2), SOFT + 0.5], [-DOWN, -0.5, -UP]),
        },
        {
            "swapped": lambda chosen, rejected: bradley_terry_loss(rejected, chosen),
            "difference": lambda chosen, rejected: rejected - chosen,
        },
    ),
    Case(
        "bradley_terry_margin",
        bradley_terry_loss,
        {"chosen": "real", "rejected": "real", "margin": "unit"},
        ("chosen", "rejected"),
        # 1 - 0.5 - 0.5 = 0: ln 2 + 0.01 * 1.5^2; gradients -1/2 and 1/2, each + 2 * 0.01 * 1.5
        {
            "chosen": [1.0],
            "rejected": [0.5],
            "margin": [0.5],
            "loss": [LN(2) + 0.0225],
            "d_chosen": [-0.47],
            "d_rejected": [0.53],
        },
        {
            "margin added": lambda chosen, rejected, margin, centering: bradley_terry_loss(
                chosen, rejected, margin=-margin, centering=centering
            ),
            "centering of the difference": lambda chosen, rejected, margin, centering: (
                bradley_terry_loss(chosen, rejected, margin=margin) + centering * (chosen - rejected).square()
            ),
        },
        {"centering": 0.01},
    ),
    Case(
        "process_reward",
        process_reward_loss,
        {"logits": "real", "labels": "unit"},
        ("logits",),
        # p = 1/2, label 1: ln 2. p = 3/4, label 1/4: -ln(3/4)/4 - 3 ln(1/4)/4. Gradient p - label.
        {
            "logits": [0.0, LN(3)],
            "labels": [1.0, 0.25],
            "loss": [LN(2), -0.25 * LN(0.75) - 0.75 * LN(0.25)],
            "d_logits": [-0.5, 0.5],
        },
        {"right alone": lambda logits, labels: -labels * logsigmoid(logits)},
    ),
    Case(
        "regression",
        reward_regression_loss,
        {"rewards": "real", "targets": "real"},
        ("rewards",),
        {"rewards": [1.0, 0.5], "targets": [3.0, 0.0], "loss": [2.0, 0.125], "d_rewards": [-2.0, 0.5]},
        {"no half": lambda rewards, targets: (rewards - targets).square()},
    ),
    Case(
        "huber",
        reward_regression_loss,
        {"rewards": "real", "targets": "real"},
        ("rewards",),
        # error -2, beyond delta 1: 1 (2 - 1/2); error 1/2, within: 1/8
        {"rewards": [1.0, 0.5], "targets": [3.0, 0.0], "loss": [1.5, 0.125], "d_rewards": [-1.0, 0.5]},
        {"squared": lambda rewards, targets, huber_delta: (rewards - targets).square() / 2},
        {"huber_delta": 1.0},
    ),
]
