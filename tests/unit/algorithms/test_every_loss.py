"""What holds for every loss: literal values, a caught bug, its gradient, and that only its own tokens matter."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import GlobalCounts, aggregation_weights, count, weighted_sum
from tests.unit.algorithms.loss_case import MASKS, Case, check_literal, draw, pack
from tests.unit.algorithms.policy_cases import KL_CASES, POLICY_CASES, VALUE_CASES
from tests.unit.algorithms.preference_cases import MARGIN_CASES, REWARD_CASES, SUPERVISED_CASES

CASES = [*POLICY_CASES, *KL_CASES, *VALUE_CASES, *SUPERVISED_CASES, *MARGIN_CASES, *REWARD_CASES]
COUNTS = GlobalCounts(num_tokens=6.0, num_sequences=3.0)  # of MASKS
NAN, INF = float("nan"), float("inf")

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def loss_and_gradients(case: Case, micro_batch: dict[str, Tensor], mode: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the loss of the batch, and its gradients by the trained inputs."""
    micro_batch = dict(micro_batch)
    for name in case.trained:
        micro_batch[name] = micro_batch[name].clone().requires_grad_()
    weights = aggregation_weights(
        micro_batch["loss_mask"], micro_batch["cu_seqlens"], mode=mode, counts=COUNTS, token_sum_norm=7.0
    )
    loss = weighted_sum(case.call(micro_batch), weights)
    loss.backward()
    gradients: dict[str, Any] = {name: micro_batch[name].grad for name in case.trained}
    return loss.detach(), gradients


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to lay the items out in micro-batches."""
    if not items:
        yield []
        return
    head, *tail = items
    for micro_batches in partitions(tail):
        yield [[head], *micro_batches]
        for i in range(len(micro_batches)):
            yield [*micro_batches[:i], [head, *micro_batches[i]], *micro_batches[i + 1 :]]


def test_the_batch_is_what_it_is_counted_as() -> None:
    micro_batch = pack([{"loss_mask": torch.tensor(mask)} for mask in MASKS])
    assert count(micro_batch["loss_mask"], micro_batch["cu_seqlens"]) == (COUNTS.num_tokens, COUNTS.num_sequences)


@every_case
def test_literal_values_and_gradients(case: Case) -> None:
    check_literal(case)


@pytest.mark.parametrize(("case", "bug"), [(case, bug) for case in CASES for bug in case.mutants], ids=str)
def test_a_planted_bug_is_caught(case: Case, bug: str) -> None:
    with pytest.raises(AssertionError):
        check_literal(case, case.mutants[bug])


def test_every_loss_has_a_planted_bug() -> None:
    assert all(case.mutants for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", [case for case in CASES if not case.stops_gradient], ids=str)
def test_gradient_agrees_with_finite_differences(case: Case) -> None:
    micro_batch = pack(draw(case), padding=1)
    weights = aggregation_weights(
        micro_batch["loss_mask"],
        micro_batch["cu_seqlens"],
        mode="sequence_mean_token_mean",
        counts=COUNTS,
        token_sum_norm=None,
    )

    def loss(*trained: Tensor) -> Tensor:
        return weighted_sum(case.call(micro_batch | dict(zip(case.trained, trained, strict=True))), weights.double())

    # No random number is closer to a kink than gradcheck's step of 1e-6.
    inputs = [micro_batch[name].clone().requires_grad_() for name in case.trained]
    assert torch.autograd.gradcheck(loss, inputs)


# The weights of all modes are tested for themselves; a sequence's loss could still depend on how they differ.
@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, "sequence_mean_token_mean") for case in CASES]
    + [(case, "token_mean") for case in CASES if case.by_sequence],
    ids=str,
)
def test_no_packing_padding_order_micro_batch_or_rank_matters(case: Case, mode: str) -> None:
    # Ranks are micro-batches too: each adds its part of the loss.
    sequences = draw(case)
    whole, reference = loss_and_gradients(case, pack(sequences), mode)
    cuts = [0, *itertools.accumulate(len(mask) for mask in MASKS)]
    num_splits = 0
    for micro_batches in partitions([0, 1, 2, 3]):
        for padding, reverse in ((0, False), (3, True)):
            total = torch.zeros((), dtype=torch.float64)
            for micro_batch in [micro_batch[::-1] for micro_batch in micro_batches[::-1]] if reverse else micro_batches:
                loss, gradients = loss_and_gradients(case, pack([sequences[i] for i in micro_batch], padding), mode)
                total += loss
                start = 0
                for i in micro_batch:
                    end = start + len(MASKS[i])
                    for name in case.trained:
                        # Bit for bit: sums over a sequence run in its own order, and the weights are the batch's. But
                        # torch's sigmoid in a vector and in what is over differ by up to 3e-16 of it on some CPUs.
                        found, expected = gradients[name][start:end], reference[name][cuts[i] : cuts[i + 1]]
                        torch.testing.assert_close(found, expected, atol=0, rtol=1e-15 if case.name == "kto" else 0)
                    start = end
            # Only the order of a float64 sum of six terms differs.
            torch.testing.assert_close(total, whole, atol=1e-14, rtol=1e-14)
        num_splits += 1
    assert num_splits == 15
    assert any(gradient.any() for gradient in reference.values())


@every_case
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e300])
def test_masked_tokens_may_hold_anything(case: Case, garbage: float) -> None:
    sequences = draw(case)
    clean, reference = loss_and_gradients(case, pack(sequences, padding=2), "sequence_mean_token_mean")
    for sequence in sequences:
        for name, kind in case.inputs.items():
            if kind != "bool":
                sequence[name][sequence["loss_mask"] == 0] = garbage
    micro_batch = pack(sequences, padding=2, garbage=garbage)
    loss, gradients = loss_and_gradients(case, micro_batch, "sequence_mean_token_mean")
    assert torch.equal(loss, clean)
    for name in case.trained:
        assert torch.equal(gradients[name], reference[name])
        assert not gradients[name][micro_batch["loss_mask"] == 0].any()


@every_case
def test_an_unmasked_nan_is_seen_and_stays_out_of_the_gradient(case: Case) -> None:
    for name, kind in case.inputs.items():
        if kind == "bool":
            continue
        sequences = draw(case)
        sequences[1][name][2] = NAN
        loss, gradients = loss_and_gradients(case, pack(sequences), "token_mean")
        assert torch.isnan(loss), name
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values()), name


@every_case
@pytest.mark.parametrize("extreme", [1e4, 100.0, -1e4])
def test_extreme_inputs_stay_finite(case: Case, extreme: float) -> None:
    # float32, in which exp overflows at 88.7: every pair of inputs that far apart, in either direction.
    names = [name for name, kind in case.inputs.items() if kind in ("log_prob", "real")]
    for far in names:
        sequences = [
            {name: value.float() if value.is_floating_point() else value for name, value in sequence.items()}
            for sequence in draw(case)
        ]
        for sequence in sequences:
            value = sequence[far]
            # Log-probs are not above 0: there, "far above" is all others far below.
            if case.inputs[far] == "log_prob" and extreme > 0:
                for other in names:
                    if other != far and case.inputs[other] == "log_prob":
                        sequence[other] -= extreme
                value[:] = -1e-8
            else:
                value += extreme
        loss, gradients = loss_and_gradients(case, pack(sequences), "token_mean")
        assert torch.isfinite(loss), far
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values()), far


@every_case
def test_only_the_trained_inputs_get_a_gradient(case: Case) -> None:
    micro_batch = pack(draw(case))
    for name, kind in case.inputs.items():
        if kind != "bool":
            micro_batch[name].requires_grad_()
    torch.where(micro_batch["loss_mask"] > 0, case.call(micro_batch), 0.0).sum().backward()
    with_gradient = {name for name in case.inputs if micro_batch[name].grad is not None}
    assert with_gradient == set(case.trained)


@pytest.mark.parametrize("case", POLICY_CASES, ids=str)
def test_on_the_policy_that_sampled_all_are_reinforce(case: Case) -> None:
    # Ratio 1: each gradient is -A_t w_t. Only the trajectory's ratio, a product, weighs a token by the length n_i too.
    micro_batch = pack(draw(case))
    lengths = torch.tensor([sum(mask) for mask in MASKS for _ in mask], dtype=torch.float64)
    if "old_log_probs" in case.inputs:
        micro_batch["old_log_probs"] = micro_batch["log_probs"].clone()
    _, gradients = loss_and_gradients(case, micro_batch, "sequence_mean_token_mean")
    weights = micro_batch["loss_mask"] / lengths.clamp(min=1) / COUNTS.num_sequences
    expected = -micro_batch["advantages"] * weights * (lengths if case.name == "ppo_trajectory" else 1.0)
    # The weights are float32: one rounding, 6e-8.
    torch.testing.assert_close(gradients["log_probs"], expected, atol=0, rtol=1e-7)


@pytest.mark.parametrize("case", POLICY_CASES, ids=str)
def test_no_advantage_is_no_loss_and_no_gradient(case: Case) -> None:
    micro_batch = pack(draw(case))
    micro_batch["advantages"] = torch.zeros_like(micro_batch["advantages"])
    loss, gradients = loss_and_gradients(case, micro_batch, "token_mean")
    assert float(loss) == 0.0
    assert not gradients["log_probs"].any()
