"""KL estimators on a policy of four outcomes, where every expectation is a sum that can be written down."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.algorithms.aggregation import weighted_sum
from megatron_rl.algorithms.kl import kl_estimate

ESTIMATORS = ["k1", "k2", "k3"]


def two_policies():
    theta = torch.tensor([0.3, -1.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    ref_log_probs = torch.tensor([-0.5, 0.4, 0.2, 1.0], dtype=torch.float64).log_softmax(0)
    return theta, theta.log_softmax(0), ref_log_probs


def reverse_kl(log_probs, ref_log_probs):
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum()


def forward_kl(log_probs, ref_log_probs):
    return (ref_log_probs.exp() * (ref_log_probs - log_probs)).sum()


def expected_value(log_probs, values):
    """E[values(x)], x ~ policy, with the samples held fixed: no gradient through their probabilities."""
    return (log_probs.exp().detach() * values).sum()


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # d = log_prob - ref = 1 and -1. k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d: 1/e and e - 2.
    [("k1", [1.0, -1.0]), ("k2", [0.5, 0.5]), ("k3", [1 / math.e, math.e - 2])],
)
def test_values_by_hand(estimator, expected):
    got = kl_estimate(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]), estimator)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected), atol=6e-8, rtol=6e-8)  # one rounding to float32


def test_k1_and_k3_are_unbiased_in_value_and_k2_is_not():
    _, log_probs, ref_log_probs = two_policies()
    log_probs = log_probs.detach()
    kl = float(reverse_kl(log_probs, ref_log_probs))
    bias = {
        name: float(expected_value(log_probs, kl_estimate(log_probs, ref_log_probs, name))) - kl for name in ESTIMATORS
    }
    assert abs(bias["k1"]) < 1e-15  # float64 rounding
    assert abs(bias["k3"]) < 1e-15
    assert abs(bias["k2"]) > 0.01 * kl


def test_k3_of_the_inverse_ratio_is_biased():
    # (r - 1) - log r with r = policy / reference is a mean-zero control variate only under samples of the reference.
    _, log_probs, ref_log_probs = two_policies()
    log_probs = log_probs.detach()
    log_ratio = log_probs - ref_log_probs
    inverse = (log_ratio.exp() - 1) - log_ratio
    kl = float(reverse_kl(log_probs, ref_log_probs))
    assert abs(float(expected_value(log_probs, inverse)) - kl) > 0.1 * kl


def expected_gradient(estimator):
    theta, log_probs, ref_log_probs = two_policies()
    expected_value(log_probs, kl_estimate(log_probs, ref_log_probs, estimator)).backward()
    return theta.grad


def gradient_of(divergence):
    theta, log_probs, ref_log_probs = two_policies()
    divergence(log_probs, ref_log_probs).backward()
    return theta.grad


def test_what_the_gradient_of_each_estimator_minimises():
    reverse, forward = gradient_of(reverse_kl), gradient_of(forward_kl)
    exact = {"atol": 1e-15, "rtol": 0}  # float64 rounding of numbers below 1
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4, dtype=torch.float64), **exact)
    torch.testing.assert_close(expected_gradient("k2"), reverse, **exact)
    torch.testing.assert_close(expected_gradient("k3"), forward, **exact)
    assert (reverse - forward).abs().max() > 0.05  # the two are not the same thing here


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_agrees_with_finite_differences(estimator):
    _, log_probs, ref_log_probs = two_policies()
    log_probs = log_probs.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref_log_probs, estimator), (log_probs,))


@given(st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=8), st.floats(-(2.0**-10), 2.0**-10, width=32))
def test_k2_and_k3_are_never_negative(log_probs, step):
    policy = torch.tensor(log_probs)
    for estimator in ("k2", "k3"):
        assert (kl_estimate(policy, policy + step, estimator) >= 0).all()
        assert (kl_estimate(policy, policy.flip(0), estimator) >= 0).all()
        assert (kl_estimate(policy, policy.clone(), estimator) == 0).all()


def test_k3_keeps_its_digits_where_the_policies_nearly_agree():
    # d = 2^-13: k3 = d^2/2 - d^3/6 = 7.450277e-9; in float32 exp(-d) alone is rounded to 6e-8.
    log_probs = torch.tensor([2.0**-13], requires_grad=True)
    value = kl_estimate(log_probs, torch.zeros(1), "k3")
    value.backward()
    d = 2.0**-13
    assert float(value.detach()) == pytest.approx(d**2 / 2 - d**3 / 6, rel=1e-7)  # the next term is d^2/12 = 1e-9 of it
    assert float(log_probs.grad) == pytest.approx(d - d**2 / 2, rel=1e-7)  # 1 - exp(-d)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_extreme_ratios_stay_finite(estimator, difference):
    log_probs = torch.tensor([difference], requires_grad=True)
    value = kl_estimate(log_probs, torch.zeros(1), estimator)
    value.backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(log_probs.grad).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_masked_tokens_may_hold_anything_and_unmasked_are_seen(estimator, garbage):
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    values = kl_estimate(log_probs, torch.tensor([-1.5, garbage]), estimator)
    assert torch.isnan(values[1])
    weighted_sum(values, torch.tensor([1.0, 0.0])).backward()
    alone = torch.tensor([-1.0], requires_grad=True)
    kl_estimate(alone, torch.tensor([-1.5]), estimator).sum().backward()
    assert log_probs.grad.tolist() == [float(alone.grad), 0.0]


def test_the_reference_gets_no_gradient():
    log_probs = torch.zeros(1, requires_grad=True)
    reference = torch.ones(1, requires_grad=True)
    kl_estimate(log_probs, reference, "k3").sum().backward()
    assert reference.grad is None


def test_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'; one of 'k1', 'k2', 'k3'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
