"""The clipped surrogate: every branch by hand, its gradient in closed form, and what must not reach it."""

import math

import pytest
import torch

from megatron_rl.algorithms.aggregation import weighted_sum
from megatron_rl.algorithms.kl import MAX_LOG_RATIO
from megatron_rl.algorithms.metrics import combine
from megatron_rl.algorithms.policy_loss import ppo_clip_loss, ppo_clip_metrics

CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}

# ratio, advantage, loss, d loss / d log_prob. The region is [0.8, 1.28]; inside it, and where the clip makes the loss
# smaller, the loss is -r A and its gradient -r A too, because dr/dlog_prob = r. Elsewhere the gradient is 0.
BRANCHES = [
    (1.1, 2.0, -2.2, -2.2),  # inside
    (1.1, -2.0, 2.2, 2.2),  # inside
    (1.5, 2.0, -2.56, 0.0),  # above, clipped: -min(3, 1.28 * 2)
    (0.5, 2.0, -1.0, -1.0),  # below, good: -min(1, 1.6) is unclipped
    (1.5, -2.0, 3.0, 3.0),  # above, bad: -min(-3, -2.56) is unclipped
    (0.5, -2.0, 1.6, 0.0),  # below, clipped: -min(-1, -1.6)
    (2.5, -2.0, 5.0, 5.0),  # above, bad, below the dual clip's 3 * 2 = 6
    (5.0, -2.0, 6.0, 0.0),  # above, bad, dual clip: min(10, 6)
    (5.0, 2.0, -2.56, 0.0),  # the dual clip is for bad tokens only
    (1.5, 0.0, 0.0, 0.0),  # no advantage, no loss
]


def branches(dtype=torch.float64):
    ratio, advantages, losses, gradients = torch.tensor(BRANCHES, dtype=dtype).unbind(1)
    old_log_probs = torch.linspace(-3.0, -0.5, len(BRANCHES), dtype=dtype)
    return (old_log_probs + ratio.log()).requires_grad_(), old_log_probs, advantages, losses, gradients


def check_branches(loss_function):
    log_probs, old_log_probs, advantages, expected, gradients = branches()
    losses = loss_function(log_probs, old_log_probs, advantages, **CLIP)
    losses.sum().backward()
    # float64 through one log and one exp: 1e-16 times a few.
    torch.testing.assert_close(losses.detach(), expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(log_probs.grad, gradients, atol=1e-13, rtol=0)


def test_every_branch_and_its_gradient():
    check_branches(ppo_clip_loss)


def _surrogate(log_probs, old_log_probs, advantages, clip_low, clip_high, *, pick=torch.maximum):
    ratio = (log_probs - old_log_probs).exp()
    return pick(-ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def one_bound_for_both(log_probs, old, advantages, *, clip_low, clip_high, dual_clip):
    return torch.where(
        advantages < 0,
        _surrogate(log_probs, old, advantages, clip_low, clip_low).minimum(-dual_clip * advantages),
        _surrogate(log_probs, old, advantages, clip_low, clip_low),
    )


def optimistic(log_probs, old, advantages, *, clip_low, clip_high, dual_clip):
    return _surrogate(log_probs, old, advantages, clip_low, clip_high, pick=torch.minimum)


def no_dual_clip(log_probs, old, advantages, *, clip_low, clip_high, dual_clip):
    return _surrogate(log_probs, old, advantages, clip_low, clip_high)


def dual_clip_for_all(log_probs, old, advantages, *, clip_low, clip_high, dual_clip):
    return _surrogate(log_probs, old, advantages, clip_low, clip_high).minimum(-dual_clip * advantages)


@pytest.mark.parametrize("wrong", [one_bound_for_both, optimistic, no_dual_clip, dual_clip_for_all])
def test_the_branches_catch_wrong_losses(wrong):
    with pytest.raises(AssertionError):
        check_branches(wrong)


def test_without_dual_clip_the_loss_of_a_bad_token_is_not_bounded():
    loss = ppo_clip_loss(
        torch.tensor([math.log(5.0)]), torch.tensor([0.0]), torch.tensor([-2.0]), **{**CLIP, "dual_clip": None}
    )
    assert float(loss) == pytest.approx(10.0, rel=1e-6)  # float32 log and exp


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradient_agrees_with_finite_differences(dual_clip):
    log_probs, old_log_probs, advantages, _, _ = branches()

    def losses(x):
        return ppo_clip_loss(x, old_log_probs, advantages, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)

    assert torch.autograd.gradcheck(losses, (log_probs,))  # no branch is closer to a kink than gradcheck's step of 1e-6


def test_at_ratio_1_the_gradient_is_minus_the_advantage_exactly():
    log_probs = torch.tensor([-0.3, -7.1, -1e-4], requires_grad=True)
    advantages = torch.tensor([1.7, -0.3, 0.0])
    ppo_clip_loss(log_probs, log_probs.detach().clone(), advantages, **CLIP).sum().backward()
    assert torch.equal(log_probs.grad, -advantages)


def test_old_log_probs_and_advantages_get_no_gradient():
    log_probs, old_log_probs, advantages, _, _ = branches()
    old_log_probs.requires_grad_(), advantages.requires_grad_()
    ppo_clip_loss(log_probs, old_log_probs, advantages, **CLIP).sum().backward()
    assert log_probs.grad is not None
    assert old_log_probs.grad is None
    assert advantages.grad is None


@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, 88.8, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_extreme_ratios_stay_finite(log_ratio, advantage, dual_clip):
    log_probs = torch.tensor([log_ratio], requires_grad=True)
    loss = ppo_clip_loss(
        log_probs, torch.zeros(1), torch.tensor([advantage]), clip_low=0.2, clip_high=0.2, dual_clip=dual_clip
    )
    loss.square().sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(log_probs.grad).all()


def test_the_bound_of_the_log_ratio_changes_nothing_below_it():
    log_probs = torch.tensor([MAX_LOG_RATIO - 0.01, MAX_LOG_RATIO + 0.01], dtype=torch.float64, requires_grad=True)
    losses = ppo_clip_loss(
        log_probs, torch.zeros(2), torch.tensor([-1.0, -1.0]), clip_low=0.2, clip_high=0.2, dual_clip=None
    )
    losses.sum().backward()
    below, bound = math.exp(MAX_LOG_RATIO - 0.01), math.exp(MAX_LOG_RATIO)
    assert losses.tolist() == pytest.approx([below, bound], rel=1e-12)
    assert log_probs.grad.tolist() == pytest.approx([below, 0.0], rel=1e-12)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("where", [(1,), (2,), (1, 2)])
def test_masked_tokens_may_hold_anything(garbage, where):
    inputs = [tensor.detach().clone() for tensor in branches(torch.float32)[:3]]
    weights = torch.ones(len(BRANCHES))
    weights[3:7] = 0
    clean = inputs[0].clone().requires_grad_()
    expected = weighted_sum(ppo_clip_loss(clean, inputs[1], inputs[2], **CLIP), weights)
    expected.backward()
    for i in where:
        inputs[i][3:7] = garbage
    log_probs = inputs[0].requires_grad_()
    loss = weighted_sum(ppo_clip_loss(log_probs, inputs[1], inputs[2], **CLIP), weights)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(log_probs.grad, clean.grad)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_an_unmasked_nan_is_seen(where):
    inputs = [tensor.detach().clone() for tensor in branches(torch.float32)[:3]]
    inputs[where][4] = float("nan")
    assert torch.isnan(weighted_sum(ppo_clip_loss(*inputs, **CLIP), torch.ones(len(BRANCHES))))


def test_dual_clip_of_1_or_less_is_an_error():
    with pytest.raises(ValueError, match=r"dual_clip is 1\.0; must be greater than 1"):
        ppo_clip_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), clip_low=0.2, clip_high=0.2, dual_clip=1.0)


def results(metrics):
    return {name: metric.result() for name, metric in metrics.items()}


def test_metrics_by_hand():
    # Clipped of the ten branches (ratio, advantage): _low (0.5, -2); _high (1.5, 2) and (5, 2); _dual (5, -2).
    log_probs, old_log_probs, advantages, _, _ = branches()
    got = results(ppo_clip_metrics(log_probs, old_log_probs, advantages, torch.ones(10), **CLIP))
    ratios = [ratio for ratio, *_ in BRANCHES]
    assert got == pytest.approx(
        {
            "policy/approx_kl": sum(ratio - 1 - math.log(ratio) for ratio in ratios) / 10,
            "policy/ratio_max": 5.0,
            "policy/ratio_min": 0.5,
            "policy/clip_fraction": 0.4,
            "policy/clip_fraction_low": 0.1,
            "policy/clip_fraction_high": 0.2,
            "policy/clip_fraction_dual": 0.1,
        },
        rel=1e-12,
    )


def test_clip_fraction_counts_the_tokens_without_gradient():
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(2000, generator=generator).requires_grad_()
    old_log_probs, advantages = torch.randn(2, 2000, generator=generator)
    ppo_clip_loss(log_probs, old_log_probs, advantages, **CLIP).sum().backward()
    metric = ppo_clip_metrics(log_probs, old_log_probs, advantages, torch.ones(2000), **CLIP)["policy/clip_fraction"]
    assert metric.value == float((log_probs.grad == 0).sum())
    assert 400 < metric.value < 1600  # the test would be empty if nothing or everything were clipped


def test_metrics_of_equal_policies():
    log_probs = torch.tensor([-0.1, -12.3, -1e-7])
    got = results(ppo_clip_metrics(log_probs, log_probs.clone(), torch.ones(3), torch.ones(3), **CLIP))
    assert got["policy/approx_kl"] == 0.0
    assert got["policy/ratio_max"] == got["policy/ratio_min"] == 1.0
    assert got["policy/clip_fraction"] == 0.0


def test_metrics_ignore_masked_tokens_and_the_split():
    log_probs, old_log_probs, advantages, _, _ = branches()
    whole = results(ppo_clip_metrics(log_probs, old_log_probs, advantages, torch.ones(10), **CLIP))
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float64)
    parts = {}
    for rows in (slice(0, 3), slice(3, 10)):
        parts = combine(
            parts,
            ppo_clip_metrics(
                torch.cat([log_probs[rows], garbage]),
                torch.cat([old_log_probs[rows], garbage.flip(0)]),
                torch.cat([advantages[rows], garbage]),
                torch.cat([torch.ones(len(log_probs[rows])), torch.zeros(3)]),
                **CLIP,
            ),
        )
    assert results(parts) == pytest.approx(whole, rel=1e-12)  # float64 sums in another order


def test_metrics_stay_finite():
    log_probs, old_log_probs = torch.tensor([1e4, -1e4]), torch.zeros(2)
    got = results(ppo_clip_metrics(log_probs, old_log_probs, torch.tensor([-1.0, 1.0]), torch.ones(2), **CLIP))
    assert all(math.isfinite(value) for value in got.values())
    assert got["policy/ratio_max"] == pytest.approx(math.exp(MAX_LOG_RATIO))
