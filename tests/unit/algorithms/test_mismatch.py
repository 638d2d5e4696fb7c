"""Mismatch of two log-probs by hand: agreement, direction of the KL, and masked garbage."""

import math

import pytest
import torch

from megatron_rl.algorithms.diagnostics import mismatch_metrics
from megatron_rl.algorithms.metrics import combine


def results(metrics):
    return {name: metric.result() for name, metric in metrics.items()}


def mismatch(log_probs, rollout_log_probs, mask):
    return mismatch_metrics(*(torch.tensor(values) for values in (log_probs, rollout_log_probs, mask)))


def test_by_hand():
    # d = policy - rollout = 0, 0.5, -1 (exact in binary). |d|: mean 0.5, max 1.
    # exp|d|: (1 + e^0.5 + e) / 3. k3 under the rollout's samples: exp(d) - 1 - d = 0, e^0.5 - 1.5, e^-1.
    got = results(mismatch([-1.0, -1.5, -3.0], [-1.0, -2.0, -2.0], [1.0, 1.0, 1.0]))
    assert got == pytest.approx(
        {
            "mismatch/log_prob_abs_diff_mean": 0.5,
            "mismatch/log_prob_abs_diff_max": 1.0,
            "mismatch/token_mult_prob_error": (1 + math.exp(0.5) + math.e) / 3,
            "mismatch/kl": (math.exp(0.5) - 1.5 + math.exp(-1)) / 3,
        },
        rel=1e-14,
    )
    # With the two exchanged, k3 would be (exp(-0.5) - 0.5 + e - 2) / 3 = 0.275; here it is 0.172.
    assert got["mismatch/kl"] < 0.18


def test_kl_is_that_of_the_rollout_in_expectation():
    # Every outcome of a 3-way softmax, each as often as the rollout samples it: masks act as weights.
    policy = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    rollout = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    got = mismatch_metrics(policy.log(), rollout.log(), rollout)["mismatch/kl"].result()
    exact = float((rollout * (rollout / policy).log()).sum())
    assert got == pytest.approx(exact, rel=1e-13)
    assert abs(exact - float((policy * (policy / rollout).log()).sum())) > 0.005  # the other direction differs


def test_equal_log_probs_are_exactly_no_mismatch():
    log_probs = [-0.1, -1e-8, -17.3]
    got = results(mismatch(log_probs, log_probs, [1.0, 1.0, 1.0]))
    assert got == {
        "mismatch/log_prob_abs_diff_mean": 0.0,
        "mismatch/log_prob_abs_diff_max": 0.0,
        "mismatch/token_mult_prob_error": 1.0,
        "mismatch/kl": 0.0,
    }


def test_masked_tokens_and_the_split_do_not_matter():
    nan, inf = float("nan"), float("inf")
    whole = results(mismatch([-1.0, -1.5, -3.0], [-1.0, -2.0, -2.0], [1.0, 1.0, 1.0]))
    first = mismatch([nan, -1.0, 0.0], [0.0, -1.0, -inf], [0.0, 1.0, 0.0])
    second = mismatch([-1.5, -3.0, inf], [-2.0, -2.0, inf], [1.0, 1.0, 0.0])
    assert results(combine(first, second)) == pytest.approx(whole, rel=1e-14)


def test_extreme_differences_stay_finite():
    got = results(mismatch([0.0, -1e4], [-1e4, 0.0], [1.0, 1.0]))
    assert all(math.isfinite(value) for value in got.values())
    assert got["mismatch/log_prob_abs_diff_max"] == 1e4
