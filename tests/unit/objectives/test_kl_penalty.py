"""The KL penalty in rewards, its coefficient and its reference, without a model: log-probs are literal."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_rl.config.schema import KLConfig, KLEstimator, KLPlace, KLReference
from megatron_rl.data.packing import MicroBatch
from megatron_rl.engine.reference import ReferenceWeights
from megatron_rl.objectives.penalties import KLPenalty
from megatron_rl.runs.record import RunState


def micro_batch(**per_token: list[float]) -> MicroBatch:
    return cast(
        Any,
        SimpleNamespace(
            loss_mask=torch.tensor([0.0, 1.0, 1.0]),
            per_token={name: torch.tensor(values) for name, values in per_token.items()},
        ),
    )


def test_each_token_pays_for_its_own_kl() -> None:
    config = KLConfig(coefficient=0.5, estimator=KLEstimator.k1, place=KLPlace.reward)
    packed = micro_batch(
        old_log_probs=[math.nan, -1.0, -2.0], ref_log_probs=[math.nan, -3.0, -1.0], token_rewards=[0.0, 1.0, 0.0]
    )
    KLPenalty(config, cast(Any, object()), RunState()).penalise([packed])
    assert packed.per_token["token_rewards"].tolist() == [0.0, 1.0 - 0.5 * 2.0, 0.5]


@pytest.mark.parametrize("config", [KLConfig(coefficient=0.5), KLConfig(coefficient=0.5, place=KLPlace.reward)])
def test_without_a_reference_or_in_the_loss_rewards_stay(config: KLConfig) -> None:
    reference = None if config.place is KLPlace.reward else cast(Any, object())
    packed = micro_batch()
    KLPenalty(config, reference, RunState()).penalise([packed])
    assert packed.per_token == {}


def test_the_coefficient_is_adapted_and_is_part_of_the_state() -> None:
    """KL twice the target: the error is bounded at 0.2, and 64 of 640 samples go by: a factor 1.02."""
    state = RunState()
    config = KLConfig(coefficient=0.5, target=0.1, horizon=640)
    penalty = KLPenalty(config, cast(Any, object()), state)
    assert penalty.after_step({"policy/kl_ref": 0.2}, 64) == {"policy/kl_coefficient": 0.5}
    resumed = KLPenalty(config, cast(Any, object()), RunState(adaptive=dict(state.adaptive)))
    assert resumed.coefficient == pytest.approx(0.51)


class Follower(ReferenceWeights):
    """Reference weights of a policy of one number."""

    def __init__(self) -> None:
        self.parameter = torch.tensor([1.0])
        super().__init__(cast(Any, None), is_average=True)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"p": self.parameter}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (KLConfig(coefficient=1.0), [1.0, 1.0, 1.0, 1.0]),
        # The policy is 2, 3, 4, 5 after steps 1 to 4; copies are made after steps 2 and 4.
        (KLConfig(coefficient=1.0, reference=KLReference.refreshed, refresh_interval=2), [1.0, 3.0, 3.0, 5.0]),
        (
            KLConfig(coefficient=1.0, reference=KLReference.moving_average, moving_average_decay=0.5),
            [1.5, 2.25, 3.125, 4.0625],
        ),
    ],
)
def test_the_reference_moves_as_configured(config: KLConfig, expected: list[float]) -> None:
    reference, state = Follower(), RunState()
    penalty = KLPenalty(config, reference, state)
    seen = []
    for _ in expected:
        reference.parameter += 1
        penalty.after_step({}, 1)
        state.step += 1
        seen.append(float(reference.weights["p"]))
    assert seen == expected
