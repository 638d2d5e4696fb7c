"""The objectives on one micro-batch of literal numbers: what enters the loss, with which sign, and what is only
watched."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import GlobalCounts
from megatron_rl.algorithms.metrics import Metric, combine
from megatron_rl.config.schema import (
    AlgorithmConfig,
    CorrectionConfig,
    CorrectionLevel,
    CorrectionMethod,
    CriticConfig,
    Divergence,
    KLConfig,
    KLEstimator,
    KLPlace,
    PolicyLossConfig,
    SupervisedConfig,
)
from megatron_rl.data.packing import MicroBatch
from megatron_rl.objectives.losses import resolve_policy_loss, resolve_supervised_loss
from megatron_rl.objectives.objectives import PolicyGradientObjective, SupervisedObjective, ValueObjective
from megatron_rl.parallel.fused_linear_logits_loss import OfLogits

# One sequence: a prompt token that is not trained on, whose values are nan on purpose, and two response tokens.
MASK = [0.0, 1.0, 1.0]
NAN = math.nan
COUNTS = GlobalCounts(num_tokens=2.0, num_sequences=1.0)


def micro_batch(**per_token: list[float]) -> MicroBatch:
    values = {"advantages": [0.0, 3.0, -1.0], "rollout_log_probs": [NAN, -1.0, -2.0], **per_token}
    return MicroBatch(
        tokens=torch.tensor([5, 6, 7]),
        labels=torch.tensor([6, 7, 8]),
        loss_mask=torch.tensor(MASK),
        position_ids=torch.arange(3),
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
        max_seqlen=3,
        per_token={name: torch.tensor(value) for name, value in values.items()},
        sequence_ids=(0,),
    )


def evaluate(
    algorithm: AlgorithmConfig,
    packed: MicroBatch,
    *,
    log_probs: list[float],
    entropy: list[float] | None = None,
    on_policy: bool = True,
    counts: GlobalCounts = COUNTS,
) -> tuple[float, list[float], list[float], dict[str, Metric]]:
    """(loss, its gradient by log_probs, by entropy, metrics)."""
    values = torch.tensor(log_probs, requires_grad=True)
    entropies = torch.tensor(entropy or [NAN, 1.0, 2.0], requires_grad=True)
    objective = PolicyGradientObjective(
        algorithm,
        counts,
        token_sum_norm=4.0,
        policy_loss=resolve_policy_loss(algorithm.policy_loss),
        on_policy=on_policy,
        kl_coefficient=algorithm.kl.coefficient,
    )
    loss, metrics = objective(values, entropies, packed)
    loss.backward()
    return float(loss.detach()), gradient(values), gradient(entropies), metrics


def gradient(values: Tensor) -> list[float]:
    """Zeros for what the loss does not contain."""
    return [0.0] * len(values) if values.grad is None else values.grad.tolist()


def test_on_policy_the_ratio_is_exactly_1_and_still_trains() -> None:
    loss, by_log_probs, _, metrics = evaluate(AlgorithmConfig(), micro_batch(), log_probs=[NAN, -1.1, -2.3])
    # Mean of -ratio * A = -(3 - 1) / 2, and of its gradient -A.
    assert loss == -1.0
    assert by_log_probs == [0.0, -1.5, 0.5]
    assert metrics["policy/ratio_max"].result() == metrics["policy/ratio_min"].result() == 1.0
    assert metrics["policy/approx_kl"].result() == 0.0
    assert metrics["policy/clip_fraction"].result() == 0.0


def test_off_policy_the_ratio_is_to_the_old_log_probs() -> None:
    old = [NAN, -1.1, -2.3]
    now = [NAN, -1.1 + math.log(1.5), -2.3 + math.log(1.1)]
    loss, by_log_probs, _, metrics = evaluate(
        AlgorithmConfig(), micro_batch(old_log_probs=old), log_probs=now, on_policy=False
    )
    # Ratio 1.5 with A = 3 is clipped to 1.2 and has no gradient; ratio 1.1 with A = -1 is inside.
    assert loss == pytest.approx((-1.2 * 3 + 1.1) / 2, rel=1e-6)
    assert by_log_probs == pytest.approx([0.0, 0.0, 1.1 / 2], rel=1e-6)
    assert metrics["policy/ratio_max"].result() == pytest.approx(1.5, rel=1e-6)
    assert metrics["policy/ratio_min"].result() == pytest.approx(1.1, rel=1e-6)
    assert metrics["policy/clip_fraction_high"].result() == 0.5


def test_the_mismatch_is_of_the_policy_that_sampled() -> None:
    """Log-probs that later updates have moved are no disagreement of engine and model."""
    packed = micro_batch(old_log_probs=[NAN, -1.25, -2.0])
    _, _, _, metrics = evaluate(AlgorithmConfig(), packed, log_probs=[NAN, -9.0, -9.0], on_policy=False)
    assert metrics["mismatch/log_prob_abs_diff_max"].result() == 0.25
    assert metrics["mismatch/log_prob_abs_diff_mean"].result() == 0.125
    _, _, _, metrics = evaluate(AlgorithmConfig(), micro_batch(), log_probs=[NAN, -1.5, -2.0])
    assert metrics["mismatch/log_prob_abs_diff_max"].result() == 0.5


def test_kl_in_the_loss_pulls_to_the_reference() -> None:
    algorithm = AlgorithmConfig(kl=KLConfig(coefficient=0.5, estimator=KLEstimator.k2))
    packed = micro_batch(ref_log_probs=[NAN, -2.0, -2.0], advantages=[0.0, 0.0, 0.0])
    loss, by_log_probs, _, metrics = evaluate(algorithm, packed, log_probs=[NAN, -1.0, -2.0])
    # k2 = d^2 / 2 of d = 1 and 0: mean 1/4, times 0.5. Gradient 0.5 d / 2: minimising lowers the token's log-prob.
    assert loss == 0.125
    assert by_log_probs == [0.0, 0.25, 0.0]
    assert metrics["policy/kl_ref"].result() == 0.25


def test_kl_in_the_reward_is_only_watched() -> None:
    algorithm = AlgorithmConfig(kl=KLConfig(coefficient=0.5, estimator=KLEstimator.k2, place=KLPlace.reward))
    packed = micro_batch(ref_log_probs=[NAN, -2.0, -2.0])
    loss, by_log_probs, _, metrics = evaluate(algorithm, packed, log_probs=[NAN, -1.0, -2.0])
    assert (loss, by_log_probs) == (-1.0, [0.0, -1.5, 0.5])
    assert metrics["policy/kl_ref"].result() == 0.25


def test_without_a_reference_there_is_no_kl() -> None:
    _, _, _, metrics = evaluate(AlgorithmConfig(), micro_batch(), log_probs=[NAN, -1.0, -2.0])
    assert "policy/kl_ref" not in metrics


def test_the_entropy_bonus_raises_entropy() -> None:
    algorithm = AlgorithmConfig(entropy_coefficient=0.5)
    loss, _, by_entropy, metrics = evaluate(algorithm, micro_batch(), log_probs=[NAN, -1.0, -2.0])
    # Mean entropy (1 + 2) / 2 lowers the loss of -1 by half of it; descent goes up in entropy.
    assert loss == -1.75
    assert by_entropy == [0.0, -0.25, -0.25]
    assert metrics["policy/entropy"].result() == 1.5
    assert metrics["policy/loss"].result() == -1.75


def test_a_loss_that_is_not_finite_is_seen() -> None:
    loss, _, _, metrics = evaluate(
        AlgorithmConfig(), micro_batch(advantages=[0.0, NAN, 1.0]), log_probs=[NAN, -1.0, -2.0]
    )
    assert math.isnan(loss)
    assert math.isnan(metrics["policy/loss"].result())


def test_the_loss_of_a_step_is_the_mean_of_its_updates() -> None:
    """Two updates, the first of two micro-batches, and the loss of a step is not their sum: it would grow with their
    number."""
    metrics: dict[str, Metric] = {}
    for counts, num_micro_batches in [(GlobalCounts(4.0, 2.0), 2), (COUNTS, 1)]:
        for _ in range(num_micro_batches):
            _, _, _, of_micro_batch = evaluate(
                AlgorithmConfig(), micro_batch(), log_probs=[NAN, -1.0, -2.0], counts=counts
            )
            metrics = combine(metrics, of_micro_batch)
    # The first update: two micro-batches of -2 / 4 each. The second: -2 / 2.
    assert metrics["policy/loss"].result() == -1.0


def test_supervised_loss_is_the_mean_negative_log_likelihood() -> None:
    log_probs = torch.tensor([NAN, -1.0, -2.0], requires_grad=True)
    loss, metrics = SupervisedObjective(AlgorithmConfig(), COUNTS, token_sum_norm=4.0)(
        log_probs, torch.tensor([NAN, 1.0, 2.0]), micro_batch()
    )
    loss.backward()
    assert float(loss) == metrics["sft/loss"].result() == 1.5
    assert gradient(log_probs) == [0.0, -0.5, -0.5]
    assert metrics["policy/entropy"].result() == 1.5


def test_smoothed_and_held_to_a_reference() -> None:
    """Tokens: -(0.8 lp + 0.2 mean) = 1.2 and 2.4; weight 0.5, and 0.25 times divergences of 2 and 4."""
    settings = SupervisedConfig(loss="label_smoothed", coefficient=0.5, args={"smoothing": 0.2})
    kl = KLConfig(coefficient=0.25, estimator=KLEstimator.exact, direction=Divergence.forward)
    algorithm = AlgorithmConfig(supervised=settings, kl=kl)
    packed = micro_batch(mean_log_probs=[NAN, -2.0, -4.0], divergence=[NAN, 2.0, 4.0])
    further = {name: packed.per_token[name].requires_grad_() for name in ("mean_log_probs", "divergence")}
    log_probs = torch.tensor([NAN, -1.0, -2.0], requires_grad=True)
    objective = SupervisedObjective(algorithm, COUNTS, 4.0, resolve_supervised_loss(settings))
    assert isinstance(objective.token_losses(packed), OfLogits)
    loss, metrics = objective(log_probs, torch.tensor([NAN, 1.0, 2.0]), packed)
    loss.backward()
    assert float(loss) == pytest.approx(0.5 * 1.8 + 0.25 * 3)
    assert metrics["sft/loss"].result() == float(loss)
    assert metrics["policy/kl_ref"].result() == 3.0
    assert gradient(log_probs) == pytest.approx([0, -0.2, -0.2])
    assert gradient(further["mean_log_probs"]) == pytest.approx([0, -0.05, -0.05])
    assert gradient(further["divergence"]) == [0, 0.125, 0.125]


def test_a_part_of_the_supervised_loss_token_by_token() -> None:
    settings = SupervisedConfig(coefficient=0.5)
    objective = SupervisedObjective(AlgorithmConfig(supervised=settings), COUNTS, 4.0)
    losses = objective.token_losses(micro_batch())
    assert callable(losses)
    found = losses(torch.tensor([NAN, -1.0, -2.0]), torch.zeros(3), slice(None))
    assert found.tolist() == [0, 0.25, 0.5]


def test_an_exact_kl_is_taken_as_it_is() -> None:
    algorithm = AlgorithmConfig(kl=KLConfig(coefficient=0.5, estimator=KLEstimator.exact))
    packed = micro_batch(ref_log_probs=[NAN, -9.0, -9.0], advantages=[0.0, 0.0, 0.0], divergence=[NAN, 1.0, 2.0])
    divergence = packed.per_token["divergence"].requires_grad_()
    loss, by_log_probs, _, metrics = evaluate(algorithm, packed, log_probs=[NAN, -1.0, -2.0])
    assert loss == 0.75  # 0.5 (1 + 2) / 2
    assert by_log_probs == [0, 0, 0]
    assert gradient(divergence) == [0, 0.25, 0.25]
    assert metrics["policy/kl_ref"].result() == 1.5


def test_the_value_loss_of_a_shared_critic_is_a_term_of_the_policys() -> None:
    algorithm = AlgorithmConfig(critic=CriticConfig(shared=True, coefficient=0.5, clip=1.0))
    packed = micro_batch(
        advantages=[0.0, 0.0, 0.0], returns=[NAN, 3.0, 0.0], values=[NAN, 0.0, 0.0], new_values=[NAN, 2.0, 0.5]
    )
    values = packed.per_token["new_values"].requires_grad_()
    loss, _, _, metrics = evaluate(algorithm, packed, log_probs=[NAN, -1.0, -2.0])
    # 2 has moved to its return by more than 1 from 0: max(1, (1 - 3)^2) / 2 = 2, without gradient. 0.5: 0.125, and 0.5.
    assert metrics["value/loss"].result() == (2 + 0.125) / 2
    assert metrics["policy/loss_value"].result() == loss == 0.5 * (2 + 0.125) / 2
    assert metrics["value/clip_fraction"].result() == 0.5
    assert gradient(values) == [0, 0, 0.125]


def corrected(method: CorrectionMethod, level: CorrectionLevel = CorrectionLevel.token) -> AlgorithmConfig:
    return AlgorithmConfig(correction=CorrectionConfig(method=method, level=level, low=0.6, high=1.4))


# Ratios of the policy to the engine: 1.5 and 1.1; of the whole completion 1.65.
AHEAD = [NAN, -1.0 + math.log(1.5), -2.0 + math.log(1.1)]


@pytest.mark.parametrize(
    ("algorithm", "weights"),
    [
        (corrected(CorrectionMethod.metrics_only), [1.0, 1.0]),
        (corrected(CorrectionMethod.truncate), [1.4, 1.1]),
        (corrected(CorrectionMethod.mask), [0.0, 1.1]),  # 1.5 is outside [0.6, 1.4]
        (corrected(CorrectionMethod.reject), [0.0, 1.0]),
        (corrected(CorrectionMethod.reject, CorrectionLevel.sequence), [0.0, 0.0]),
        (corrected(CorrectionMethod.truncate, CorrectionLevel.geometric), [1.65**0.5, 1.65**0.5]),
    ],
)
def test_tokens_are_weighed_by_the_ratio_to_the_engine(algorithm: AlgorithmConfig, weights: list[float]) -> None:
    _, by_log_probs, _, metrics = evaluate(algorithm, micro_batch(), log_probs=AHEAD)
    # Advantages 3 and -1, ratio to the old policy 1, mean over 2 tokens.
    assert by_log_probs == pytest.approx([0.0, -1.5 * weights[0], 0.5 * weights[1]], rel=1e-6)
    outside = 1.0 if algorithm.correction.level is not CorrectionLevel.token else 0.5
    outside = 0.0 if algorithm.correction.level is CorrectionLevel.geometric else outside  # 1.28
    assert metrics["importance/above_fraction"].result() == outside


def test_the_weighted_kl_has_a_gradient_for_k1_too() -> None:
    """On-policy: value d, gradient d + 1 per token; k1 alone has gradient 1, which says nothing of the reference."""
    kl = KLConfig(coefficient=0.5, estimator=KLEstimator.k1, weighted=True)
    packed = micro_batch(ref_log_probs=[NAN, -2.0, -2.0], advantages=[0.0, 0.0, 0.0])
    loss, by_log_probs, _, _ = evaluate(AlgorithmConfig(kl=kl), packed, log_probs=[NAN, -1.0, -2.0])
    assert loss == 0.25  # 0.5 (1 + 0) / 2
    assert by_log_probs == [0.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "gradient_of_tokens"),
    [
        ("reinforce", [-1.5, 0.5]),
        ("importance_weighted", [-1.5, 0.5]),  # equal at ratio 1, and so is every other
        ("cispo", [-1.5, 0.5]),
        ("gspo_token", [-1.5, 0.5]),
        ("gspo", [-0.5, -0.5]),  # the completion's mean: (-3 + 1) / 2 shared by its 2 tokens
    ],
)
def test_losses_are_chosen_by_name(name: str, gradient_of_tokens: list[float]) -> None:
    algorithm = AlgorithmConfig(policy_loss=PolicyLossConfig(name=name))
    _, by_log_probs, _, metrics = evaluate(algorithm, micro_batch(), log_probs=[NAN, -1.1, -2.3])
    assert by_log_probs == pytest.approx([0.0, *gradient_of_tokens], rel=1e-6)
    assert metrics["policy/ratio_max"].result() == pytest.approx(1.0)


@pytest.mark.parametrize("clip", [None, 0.25])
def test_the_value_loss_is_of_the_returns(clip: float | None) -> None:
    """Returns 5 and 0 against values 1 and 3: (16 + 9) / 2 / 2 tokens; values far from their returns are pulled."""
    values = torch.tensor([NAN, 1.0, 3.0], requires_grad=True)
    packed = micro_batch(returns=[NAN, 5.0, 0.0], values=[NAN, 1.0, 3.0])
    algorithm = AlgorithmConfig(critic=CriticConfig(clip=clip))
    found, metrics = ValueObjective(algorithm, COUNTS, token_sum_norm=4.0)(values, packed)
    found.backward()
    assert float(found.detach()) == metrics["value/loss"].result() == 6.25
    assert gradient(values) == [0.0, -2.0, 1.5]
    # Residuals 4 and -3: variance 12.25; returns 5 and 0: 6.25.
    assert metrics["value/explained_variance"].result() == pytest.approx(1 - 12.25 / 6.25)


def test_the_clip_lets_a_value_go_that_has_moved_enough() -> None:
    """From 1 to 1.5 towards 5 with clip 0.25: beyond 1.25 it is pulled no more. From 3 to 3.5, away from 0, it is."""
    values = torch.tensor([NAN, 1.5, 3.5], requires_grad=True)
    packed = micro_batch(returns=[NAN, 5.0, 0.0], values=[NAN, 1.0, 3.0])
    algorithm = AlgorithmConfig(critic=CriticConfig(clip=0.25))
    found, metrics = ValueObjective(algorithm, COUNTS, token_sum_norm=4.0)(values, packed)
    found.backward()
    assert gradient(values) == [0.0, 0.0, 1.75]
    assert metrics["value/clip_fraction"].result() == 0.5
