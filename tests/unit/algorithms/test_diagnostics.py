"""The convergence monitor, the policy's change, the loss's terms, and the critic's metrics."""

import math

import pytest
import torch

from megatron_rl.algorithms.diagnostics import ConvergenceMonitor, policy_change_metrics
from megatron_rl.algorithms.metrics import EffectiveSampleSize, ExplainedVariance, Metric, Moments, combine
from megatron_rl.algorithms.policy_loss import cispo_metrics
from megatron_rl.algorithms.value_loss import combined_loss, value_metrics

NAN = float("nan")


def test_converged_is_a_stable_loss_and_a_policy_at_rest_over_a_full_window() -> None:
    monitor = ConvergenceMonitor(window=3, loss_variance=0.1, policy_change=0.01)
    assert monitor.add(1.0, 0.0)["convergence/converged"] == 0.0  # the window is not full
    assert monitor.add(3.0, 0.0) == pytest.approx(
        {"convergence/loss_variance": 1.0, "convergence/policy_change": 0.0, "convergence/converged": 0.0}
    )
    monitor.add(3.0, 0.0)
    assert monitor.add(3.0, 0.0)["convergence/converged"] == 1.0
    # A group-relative policy loss is 0 at every step, also while the policy moves: that is not convergence.
    assert monitor.add(3.0, 0.3) == pytest.approx(
        {"convergence/loss_variance": 0.0, "convergence/policy_change": 0.1, "convergence/converged": 0.0}
    )


def test_a_change_that_could_not_be_seen_proves_no_rest() -> None:
    monitor = ConvergenceMonitor(window=2, loss_variance=0.1, policy_change=0.01)
    for _ in range(3):
        assert monitor.add(1.0, None) == {"convergence/loss_variance": 0.0, "convergence/converged": 0.0}
    monitor.add(1.0, 0.004)
    assert monitor.add(1.0, 0.002)["convergence/policy_change"] == pytest.approx(0.003)
    assert monitor.state() == {"losses": [1.0, 1.0], "changes": [0.004, 0.002]}


def test_the_monitor_goes_on_from_its_state() -> None:
    first = ConvergenceMonitor(window=3, loss_variance=0.1, policy_change=0.01)
    for loss in (5.0, 1.0, 2.0, 3.0):
        first.add(loss, 0.5)
    second = ConvergenceMonitor(window=3, loss_variance=0.1, policy_change=0.01)
    second.load(first.state())
    assert second.add(4.0, 0.0) == first.add(4.0, 0.0)
    with pytest.raises(ValueError, match="window is 1; must be at least 2 steps"):
        ConvergenceMonitor(window=1, loss_variance=0.1, policy_change=0.01)


def test_policy_change_by_hand() -> None:
    got = policy_change_metrics(
        torch.tensor([-1.0, -2.0, NAN]), torch.tensor([-1.5, -1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    )
    assert {name: metric.result() for name, metric in got.items()} == {
        "policy/change_mean": 0.75,
        "policy/change_max": 1.0,
    }


def test_the_terms_add_up_to_the_loss_and_entropy_is_a_bonus() -> None:
    weights = torch.tensor([0.5, 0.5, 0.0])
    policy = torch.tensor([1.0, 3.0, NAN], requires_grad=True)
    entropy = torch.tensor([2.0, 4.0, NAN], requires_grad=True)
    loss, terms = combined_loss(
        policy,
        weights,
        values=(torch.tensor([4.0, 8.0, NAN]), 0.5),
        entropy=(entropy, 0.1),
        kl=(torch.tensor([0.0, 1.0, NAN]), 0.2),
    )
    loss.backward()
    expected = {"policy": 2.0, "value": 3.0, "entropy": -0.3, "kl": 0.1}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected)
    assert float(loss.detach()) == pytest.approx(4.8)
    assert entropy.grad is not None
    # Going down the loss raises the entropy; added as "entropy loss" with a positive coefficient it would fall.
    torch.testing.assert_close(entropy.grad, torch.tensor([-0.05, -0.05, 0.0]))
    alone, terms = combined_loss(policy, weights)
    assert float(alone.detach()) == 2.0
    assert list(terms) == ["policy"]


def test_explained_variance_by_hand_and_in_parts() -> None:
    # Returns 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14. Residuals 0, 1, 0, 3: mean 1, squares 1 + 0 + 1 + 4 = 6.
    returns, values = torch.tensor([1.0, NAN, 2.0, 3.0, 6.0]), torch.tensor([1.0, 7.0, 1.0, 3.0, 3.0])
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    whole = value_metrics(values, returns, mask)
    assert whole["value/explained_variance"].result() == pytest.approx(1 - 6 / 14)
    assert whole["value/return_mean"].result() == 3.0
    assert whole["value/mean"].result() == 2.0
    parts = combine(value_metrics(values[:3], returns[:3], mask[:3]), value_metrics(values[3:], returns[3:], mask[3:]))
    assert parts["value/explained_variance"].result() == pytest.approx(1 - 6 / 14)
    # The mean of the parts' own explained variances would be another number: 0 and 0.
    own = [value_metrics(values[i], returns[i], mask[i])["value/explained_variance"] for i in (slice(3), slice(3, 5))]
    assert [round(metric.result(), 6) for metric in own] == [0.0, 0.0]


def test_explained_variance_of_special_critics() -> None:
    returns, ones = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3)
    assert value_metrics(returns, returns, ones)["value/explained_variance"].result() == 1.0
    # A constant explains nothing, whatever it is.
    assert value_metrics(torch.full((3,), 9.0), returns, ones)["value/explained_variance"].result() == 0.0
    assert value_metrics(-returns, returns, ones)["value/explained_variance"].result() == pytest.approx(-3.0)
    same = value_metrics(returns, torch.full((3,), 0.1), ones)["value/explained_variance"]
    assert math.isnan(same.result())


def test_value_clip_fraction_counts_the_silenced() -> None:
    # clip 0.5 about 0: moved to its return (silenced), moved past it, inside, moved away; as in the loss's literals.
    values, returns = torch.tensor([1.0, 1.0, 0.3, -1.0]), torch.tensor([3.0, 0.2, 1.0, 3.0])
    got = value_metrics(values, returns, torch.ones(4), old_values=torch.zeros(4), clip=0.5)
    assert got["value/clip_fraction"].result() == 0.25


def test_cispo_counts_bounded_weights() -> None:
    ratio = torch.tensor([0.5, 1.0, 1.5, 2.0])
    got = cispo_metrics(ratio.log(), torch.zeros(4), torch.ones(4), clip_low=0.2, clip_high=0.28)
    assert got["policy/clip_fraction"].result() == 0.75
    assert got["policy/clip_fraction_low"].result() == 0.25
    assert got["policy/ratio_max"].result() == pytest.approx(2.0)


def test_moments_keep_a_small_variance_beside_a_large_mean() -> None:
    values = torch.tensor([1e9 - 1, 1e9, 1e9 + 1], dtype=torch.float64)
    ones = torch.ones(1)
    merged = sum((Moments.of(value[None], ones) for value in values), Moments())
    assert merged.variance == pytest.approx(2 / 3, rel=1e-9)  # sums of squares near 1e18 would have lost it
    assert Moments().std == 0.0


def test_effective_sample_size() -> None:
    equal = EffectiveSampleSize(value=8.0, count=4.0, sum_of_squares=16.0)  # four weights of 2
    assert equal.result() == 1.0
    one = EffectiveSampleSize(value=5.0, count=4.0, sum_of_squares=25.0)  # 5, 0, 0, 0
    assert one.result() == 0.25
    assert (equal + one).result() == pytest.approx(13**2 / (8 * 41))
    assert math.isnan(EffectiveSampleSize().result())
    with pytest.raises(ValueError, match="cannot combine a effective_sample_size with a mean metric"):
        equal + Metric("mean", 1.0)
    with pytest.raises(ValueError, match="cannot combine a explained_variance with a mean metric"):
        ExplainedVariance() + Metric("mean", 1.0)
