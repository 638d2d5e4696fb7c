"""Objectives on preference data, on one micro-batch of literal numbers: whose tokens are whose, and what divides
what."""

import math

import pytest
import torch

from megatron_rl.algorithms.aggregation import GlobalCounts
from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import PreferenceConfig
from megatron_rl.data.packing import MicroBatch, pack
from megatron_rl.data.preferences import LabelledCompletion
from megatron_rl.objectives.losses import (
    POLICY_LOSSES,
    REWARD_LOSSES,
    is_of_pairs,
    needs_reference,
    resolve_preference_loss,
)
from megatron_rl.objectives.preference_objectives import PreferenceObjective, RewardObjective

CHOSEN, REJECTED = LabelledCompletion((7, 8), (9, 2), label=0.5), LabelledCompletion((7, 8), (5, 6, 2))
OTHER = LabelledCompletion((7,), (4, 2), label=1.0)
NAN = math.nan


def policy_micro_batch(*completions: LabelledCompletion, **per_token: list[float]) -> MicroBatch:
    """Positions: 3 of the chosen, 4 of the rejected, 1 of padding."""
    micro_batch = pack([one.for_policy() for one in completions], range(len(completions)), pad_to_multiple=8)
    micro_batch.per_token.update({name: torch.tensor(values) for name, values in per_token.items()})
    return micro_batch


def preference(settings: PreferenceConfig, num_sequences: float, num_chosen_tokens: float = 2.0) -> PreferenceObjective:
    loss = resolve_preference_loss(settings, POLICY_LOSSES)
    return PreferenceObjective(settings, loss, GlobalCounts(99.0, num_sequences), num_chosen_tokens)


# Chosen: -1 - 2 on two tokens; rejected: -1 - 1 - 3 on three. nan wherever nothing is trained.
LOG_PROBS = [NAN, -1.0, -2.0, NAN, -1.0, -1.0, -3.0, NAN]
REFERENCE = [NAN, -1.5, -2.5, NAN, -1.0, -1.0, -2.5, NAN]


def gradients(objective: PreferenceObjective, micro_batch: MicroBatch) -> tuple[float, list[float], dict[str, float]]:
    log_probs = torch.tensor(LOG_PROBS, requires_grad=True)
    loss, metrics = objective(log_probs, torch.zeros(8), micro_batch)
    loss.backward()
    assert log_probs.grad is not None
    return float(loss.detach()), log_probs.grad.tolist(), {name: m.result() for name, m in metrics.items()}


def test_dpo_of_one_of_two_pairs() -> None:
    objective = preference(PreferenceConfig(loss="dpo", beta=0.5), num_sequences=4.0)
    loss, gradient, metrics = gradients(objective, policy_micro_batch(CHOSEN, REJECTED, ref_log_probs=REFERENCE))
    # Margin (-3 + 4) - (-5 + 4.5) = 1.5, and 2 pairs in the global batch.
    weight = 0.5 / (1 + math.exp(0.75)) / 2
    assert loss == pytest.approx(math.log1p(math.exp(-0.75)) / 2, rel=1e-6)
    assert gradient == pytest.approx([0, -weight, -weight, 0, weight, weight, weight, 0], rel=1e-5)
    assert metrics["preference/accuracy"] == 1.0
    assert metrics["preference/margin"] == pytest.approx(0.75)
    assert metrics["preference/chosen_reward"] == pytest.approx(0.5)


def test_dpo_at_the_reference_is_ln_2() -> None:
    objective = preference(PreferenceConfig(loss="dpo"), num_sequences=2.0)
    loss, _, metrics = gradients(objective, policy_micro_batch(CHOSEN, REJECTED, ref_log_probs=LOG_PROBS))
    assert loss == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["preference/accuracy"] == 0.5


def test_ipo_of_means_is_over_the_tokens_of_each() -> None:
    settings = PreferenceConfig(loss="ipo", beta=0.25, length_normalized=True)
    loss, _, _ = gradients(preference(settings, 2.0), policy_micro_batch(CHOSEN, REJECTED, ref_log_probs=REFERENCE))
    # Means: 0.5 of the chosen, -1/6 of the rejected; 1 / (2 tau) = 2.
    assert loss == pytest.approx((0.5 + 1 / 6 - 2) ** 2, rel=1e-5)


def test_simpo_has_no_reference_and_takes_means() -> None:
    settings = PreferenceConfig(loss="simpo", beta=2.0, args={"gamma": 0.5})
    loss, _, _ = gradients(preference(settings, 2.0), policy_micro_batch(CHOSEN, REJECTED))
    # Means -1.5 and -5/3: 2 / 6 - 0.5.
    assert loss == pytest.approx(math.log1p(math.exp(0.5 - 1 / 3)), rel=1e-5)
    assert not needs_reference(resolve_preference_loss(settings, POLICY_LOSSES))


def test_the_sft_term_is_of_the_chosen_tokens_alone() -> None:
    settings = PreferenceConfig(loss="dpo", beta=1e-6, sft_coefficient=0.5)
    loss, gradient, metrics = gradients(
        preference(settings, 2.0, num_chosen_tokens=4.0), policy_micro_batch(CHOSEN, REJECTED, ref_log_probs=REFERENCE)
    )
    assert metrics["preference/sft_loss"] == pytest.approx(
        3.0 / 4
    )  # 4 chosen tokens in the global batch, 2 of them here
    assert loss == pytest.approx(math.log(2) + 0.5 * 3.0 / 4, rel=1e-5)
    assert gradient == pytest.approx([0, -0.125, -0.125, 0, 0, 0, 0, 0], abs=1e-6)


def test_kto_tells_good_from_bad() -> None:
    settings = PreferenceConfig(loss="kto", beta=1.0)
    good, bad = LabelledCompletion((7, 8), (9, 2), label=1.0), LabelledCompletion((7, 8), (5, 6, 2), label=0.0)
    objective = preference(settings, num_sequences=2.0)
    loss, _, metrics = gradients(objective, policy_micro_batch(good, bad, ref_log_probs=REFERENCE))
    # Log-ratios 1 and -0.5, z = 0: 1 - sigmoid(1) and 1 - sigmoid(0.5), over two completions.
    assert loss == pytest.approx((1 / (1 + math.e) + 1 / (1 + math.exp(0.5))) / 2, rel=1e-5)
    assert metrics["preference/chosen_reward"] == pytest.approx(1.0)
    assert metrics["preference/rejected_reward"] == pytest.approx(-0.5)


def reward_micro_batch(*completions: LabelledCompletion) -> MicroBatch:
    return pack([one.for_reward_model() for one in completions], range(len(completions)), pad_to_multiple=10)


def test_a_reward_model_is_read_at_the_last_tokens() -> None:
    """Bradley-Terry with the margin of the data: -log sigmoid(2 - 1 - 0.5)."""
    settings = PreferenceConfig(loss="bradley_terry")
    objective = RewardObjective(resolve_preference_loss(settings, REWARD_LOSSES), GlobalCounts(2.0, 2.0))
    values = torch.tensor([NAN, NAN, NAN, 2.0, NAN, NAN, NAN, NAN, 1.0, NAN], requires_grad=True)
    loss, metrics = objective(values, reward_micro_batch(CHOSEN, REJECTED))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-6)
    pull = 1 / (1 + math.exp(0.5))
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0, 0, 0, -pull, 0, 0, 0, 0, pull, 0], rel=1e-5)
    assert metrics["preference/accuracy"].result() == 1.0


def test_regression_and_process_rewards() -> None:
    regression = resolve_preference_loss(PreferenceConfig(loss="regression"), REWARD_LOSSES)
    values = torch.tensor([NAN, NAN, 3.0, *[NAN] * 7], requires_grad=True)
    loss, _ = RewardObjective(regression, GlobalCounts(4.0, 4.0))(values, reward_micro_batch(OTHER))
    assert float(loss.detach()) == (3 - 1) ** 2 / 2 / 4
    process = resolve_preference_loss(PreferenceConfig(loss="process"), REWARD_LOSSES)
    steps = LabelledCompletion((7,), (4, 5, 2), step_ends=(0, 1), step_labels=(1.0, 0.0))
    values = torch.tensor([NAN, 0.0, 1.0, *[NAN] * 7], requires_grad=True)
    loss, metrics = RewardObjective(process, GlobalCounts(4.0, 2.0))(values, reward_micro_batch(steps))
    assert float(loss.detach()) == pytest.approx((math.log(2) + math.log1p(math.e)) / 4, rel=1e-6)
    assert metrics["process_reward/accuracy"].result() == 0.0  # 0 counts as wrong for a right step


def test_a_micro_batch_without_sequences_has_loss_0_and_a_gradient() -> None:
    """A rank without work takes part in the backward pass all the same."""
    micro_batch = pack([CHOSEN.for_policy()], [], pad_to_multiple=8)
    micro_batch.per_token["ref_log_probs"] = torch.zeros(8)
    loss, gradient, _ = gradients(preference(PreferenceConfig(loss="dpo"), 2.0), micro_batch)
    assert (loss, gradient) == (0.0, [0.0] * 8)


@pytest.mark.parametrize(
    ("settings", "losses", "message"),
    [
        (PreferenceConfig(loss="dpoo"), POLICY_LOSSES, "did you mean 'dpo'?"),
        (PreferenceConfig(loss="dpo"), REWARD_LOSSES, "no built-in loss of this recipe 'dpo'"),
        (PreferenceConfig(loss="simpo"), POLICY_LOSSES, "'simpo' needs 'gamma'"),
        (PreferenceConfig(loss="ipo", args={"gamma": 1}), POLICY_LOSSES, "'ipo' takes no argument 'gamma'"),
    ],
)
def test_a_loss_that_cannot_be_had(settings: PreferenceConfig, losses: dict, message: str) -> None:
    with pytest.raises(UserError, match=r"algorithm\.preference") as caught:
        resolve_preference_loss(settings, losses)
    assert message in str(caught.value)


def test_what_a_loss_names_decides_its_data() -> None:
    names = {name: resolve_preference_loss(PreferenceConfig(loss=name), POLICY_LOSSES) for name in ("dpo", "kto")}
    assert (is_of_pairs(names["dpo"]), is_of_pairs(names["kto"])) == (True, False)
    assert needs_reference(names["dpo"])
    assert needs_reference(names["kto"])
