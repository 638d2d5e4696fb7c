"""Ratios at each level, what is done with them, and the metrics that describe them."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.importance import correction_weights, importance_metrics, log_ratios
from megatron_rl.algorithms.kl import MAX_LOG_RATIO
from megatron_rl.algorithms.metrics import combine
from megatron_rl.algorithms.policy_loss import ppo_clip_loss

NAN = float("nan")
# A masked token, ratios 1.2 and 0.9; ratio 1.5. Then padding.
LOG_PROBS = torch.tensor([NAN, math.log(1.2) - 1, math.log(0.9) - 1, math.log(1.5) - 1, NAN], dtype=torch.float64)
BEHAVIOUR = torch.tensor([-1.0, -1.0, -1.0, -1.0, math.inf], dtype=torch.float64)
MASK = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
CU_SEQLENS = torch.tensor([0, 3, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("level", "expected"),
    [("token", [1.0, 1.2, 0.9, 1.5]), ("sequence", [1.08] * 3 + [1.5]), ("geometric", [1.08**0.5] * 3 + [1.5])],
)
def test_ratios_by_hand(level: str, expected: list[float]) -> None:
    got = log_ratios(LOG_PROBS, BEHAVIOUR, MASK, CU_SEQLENS, level=level).exp()  # type: ignore[arg-type]
    torch.testing.assert_close(got[:4], torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0)


def test_a_nan_token_makes_its_whole_sequence_nan_and_no_other() -> None:
    log_probs = LOG_PROBS.clone()
    log_probs[2] = NAN
    got = log_ratios(log_probs, BEHAVIOUR, MASK, CU_SEQLENS, level="sequence")
    assert got[:3].isnan().all()
    assert float(got[3].exp()) == pytest.approx(1.5)
    assert log_ratios(log_probs, BEHAVIOUR, MASK, CU_SEQLENS, level="token").isnan().tolist()[1:4] == [
        False,
        True,
        False,
    ]


def weights(ratios: list[float], method: str, low: float, high: float) -> list[float]:
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    got: Tensor = correction_weights(log_ratio, method=method, low=low, high=high)  # type: ignore[arg-type]
    return [round(value, 12) for value in got.tolist()]


def test_methods_by_hand() -> None:
    ratios = [0.25, 0.7, 1.0, 1.3, 1.5, 5.0]
    assert weights(ratios, "truncate", 0.6, 1.4) == [0.25, 0.7, 1.0, 1.3, 1.4, 1.4]
    assert weights(ratios, "mask", 0.6, 1.4) == [0.0, 0.7, 1.0, 1.3, 0.0, 0.0]
    assert weights(ratios, "reject", 0.6, 1.4) == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_asymmetric_bounds_are_bounds_of_the_ratio() -> None:
    # IcePop's [0.5, 5]: inside are 0.5 and 5 themselves. A test of |ratio - 1| <= 0.5 would drop 1.6, one of
    # |log ratio| <= log 5 would keep 0.3.
    assert weights([0.3, 0.51, 1.6, 4.99, 5.1], "mask", 0.5, 5.0) == [0.0, 0.51, 1.6, 4.99, 0.0]
    assert weights([1.5], "reject", 0.6, 1.4) == [0.0]


def test_extremes_stay_finite_and_nan_is_seen() -> None:
    log_ratio = torch.tensor([1e4, -1e4, NAN])
    for method in ("truncate", "mask", "reject"):
        got = correction_weights(log_ratio, method=method, low=0.0, high=math.inf)  # type: ignore[arg-type]
        assert torch.isfinite(got[:2]).all()
        assert got[2].isnan()
    assert float(correction_weights(log_ratio, method="truncate", low=0.0, high=math.inf)[0]) == pytest.approx(
        math.exp(MAX_LOG_RATIO), rel=1e-6
    )


def test_weights_carry_no_gradient() -> None:
    log_ratio = torch.zeros(3, requires_grad=True)
    assert not correction_weights(log_ratio, method="mask", low=0.5, high=2.0).requires_grad


def test_decoupled_ppo_is_the_clip_about_the_proximal_policy_times_the_weight_to_the_behaviour() -> None:
    # pi / behaviour A where nothing is clipped: weight (prox / behaviour) 0.8, ratio (pi / prox) 1.1.
    behaviour, proximal = torch.tensor([-1.0]), torch.tensor([-1.0 + math.log(0.8)])
    log_probs = (proximal + math.log(1.1)).requires_grad_()
    weight = correction_weights(proximal - behaviour, method="truncate", low=0.0, high=2.0)
    loss = weight * ppo_clip_loss(log_probs, proximal, torch.tensor([2.0]), clip_low=0.2, clip_high=0.2, dual_clip=None)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(-0.88 * 2, rel=1e-6)
    assert log_probs.grad is not None
    assert float(log_probs.grad) == pytest.approx(-0.88 * 2, rel=1e-6)


def test_metrics_by_hand_and_in_parts() -> None:
    # Ratios 1, 2, 3 of three tokens: ESS (1 + 2 + 3)^2 / (3 (1 + 4 + 9)) = 36 / 42.
    log_ratio, mask = torch.tensor([0.0, math.log(2), NAN, math.log(3)]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    whole = importance_metrics(log_ratio, mask, low=1.5, high=2.5)
    expected = {
        "importance/ratio_mean": 2.0,
        "importance/ratio_min": 1.0,
        "importance/ratio_max": 3.0,
        "importance/below_fraction": 1 / 3,
        "importance/above_fraction": 1 / 3,
        "importance/effective_sample_size": 36 / 42,
    }
    # exp of a float32 logarithm: 1e-7
    assert {name: metric.result() for name, metric in whole.items()} == pytest.approx(expected, rel=3e-7)
    parts = combine(
        importance_metrics(log_ratio[:1], mask[:1], low=1.5, high=2.5),
        importance_metrics(log_ratio[1:], mask[1:], low=1.5, high=2.5),
    )
    assert {name: metric.result() for name, metric in parts.items()} == pytest.approx(expected, rel=3e-7)


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match=r"bounds are \[1\.4, 0\.6\]; must be 0 <= low < high"):
        correction_weights(torch.zeros(1), method="mask", low=1.4, high=0.6)
    with pytest.raises(ValueError, match="unknown method 'clip'; one of 'truncate', 'mask', 'reject'"):
        correction_weights(torch.zeros(1), method="clip", low=0.5, high=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown level 'step'; one of 'token', 'sequence', 'geometric'"):
        log_ratios(LOG_PROBS, BEHAVIOUR, MASK, CU_SEQLENS, level="step")  # type: ignore[arg-type]
