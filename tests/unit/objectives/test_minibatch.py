"""One optimizer step, however it is split over ranks and micro-batches: the same loss, gradient and metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.algorithms.metrics import Metric, combine
from megatron_rl.config.schema import Aggregation, AlgorithmConfig, KLConfig
from megatron_rl.data.packing import MicroBatch, unpack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.objectives.losses import resolve_policy_loss
from megatron_rl.objectives.minibatch import MiniBatch, spread
from megatron_rl.objectives.objectives import PolicyGradientObjective
from megatron_rl.parallel.groups import Groups

NORM = 5.0


@dataclass(frozen=True)
class Place:
    """A rank's place in a group of ranks that this process alone cannot form."""

    here: int
    ranks: int

    def rank(self) -> int:
        return self.here

    def size(self) -> int:
        return self.ranks


def groups(rank: int, num_ranks: int) -> Groups:
    return cast(Groups, SimpleNamespace(dp=Place(rank, num_ranks)))


def sequence(prompt: int, response: int, seed: int = 0) -> TrainingSequence:
    """Random tokens and per-token values; `now` and `entropy` stand for what a model would compute."""
    rng = np.random.default_rng([seed, prompt, response])
    mask = np.zeros(prompt + response - 1, dtype=np.float32)
    mask[prompt - 1 :] = 1.0
    per_token = {
        name: rng.normal(size=len(mask)).astype(np.float32) * scale
        for name, scale in [
            ("now", 0.3),
            ("old_log_probs", 0.3),
            ("ref_log_probs", 0.3),
            ("rollout_log_probs", 0.3),
            ("advantages", 1.0),
            ("entropy", 1.0),
        ]
    }
    return TrainingSequence(rng.integers(0, 50, prompt + response), mask, per_token)


SEQUENCES = [
    sequence(prompt, response) for prompt, response in [(3, 4), (1, 9), (2, 1), (5, 2), (1, 1), (4, 6), (2, 3)]
]
ALGORITHM = AlgorithmConfig(kl=KLConfig(coefficient=0.3), entropy_coefficient=0.1)

# What each mode divides a sequence's sum by: tokens or sequences of the whole batch, and the sequence's own length.
DIVISORS: dict[Aggregation, Callable[[float, float, float], float]] = {
    Aggregation.token_mean: lambda own, tokens, sequences: tokens,
    Aggregation.sequence_mean_token_mean: lambda own, tokens, sequences: own * sequences,
    Aggregation.sequence_mean_token_sum: lambda own, tokens, sequences: sequences,
    Aggregation.token_sum_norm: lambda own, tokens, sequences: NORM * sequences,
}


def train_on(
    chosen: list[int], mode: Aggregation, num_ranks: int, micro_batch_tokens: int, pad: int
) -> tuple[float, dict[int, list[float]], dict[str, Metric], list[MiniBatch]]:
    """Loss, its gradient per sequence and metrics of a step, added up over all ranks and micro-batches."""
    algorithm = AlgorithmConfig(**(vars(ALGORITHM) | {"aggregation": mode}))
    total, metrics = 0.0, cast(dict[str, Metric], {})
    gradients: dict[int, list[float]] = {}
    batches = [
        MiniBatch.of(
            SEQUENCES, chosen, groups(r, num_ranks), micro_batch_tokens=micro_batch_tokens, pad_to_multiple=pad
        )
        for r in range(num_ranks)
    ]
    for batch in batches:
        objective = PolicyGradientObjective(
            algorithm,
            batch.counts,
            NORM,
            policy_loss=resolve_policy_loss(algorithm.policy_loss),
            on_policy=False,
            kl_coefficient=algorithm.kl.coefficient,
        )
        for micro_batch in batch.micro_batches:
            log_probs = micro_batch.per_token["now"].clone().requires_grad_()
            loss, of_micro_batch = objective(log_probs, micro_batch.per_token["entropy"], micro_batch)
            loss.backward()
            total += float(loss.detach())
            metrics = combine(metrics, of_micro_batch)
            assert log_probs.grad is not None
            parts = unpack(log_probs.grad, micro_batch)
            gradients |= {i: part.tolist() for i, part in zip(micro_batch.sequence_ids, parts, strict=True)}
    return total, gradients, metrics, batches


def loss_by_formula(chosen: list[int], mode: Aggregation) -> float:
    """The loss from the definitions, float64: clipped surrogate + 0.3 k3 - 0.1 entropy, divided as the mode says."""
    tokens = sum(float(SEQUENCES[i].loss_mask.sum()) for i in chosen)
    total = 0.0
    for i in chosen:
        value = {name: v.astype(np.float64) for name, v in SEQUENCES[i].per_token.items()}
        ratio = np.exp(value["now"] - value["old_log_probs"])
        surrogate = np.minimum(ratio * value["advantages"], np.clip(ratio, 0.8, 1.2) * value["advantages"])
        d = value["now"] - value["ref_log_probs"]
        losses = -surrogate + 0.3 * (np.exp(-d) - 1 + d) - 0.1 * value["entropy"]
        mask = SEQUENCES[i].loss_mask
        total += float((losses * mask).sum()) / DIVISORS[mode](float(mask.sum()), tokens, len(chosen))
    return total


@pytest.mark.parametrize("mode", list(Aggregation))
@settings(max_examples=15, deadline=None)
@given(
    num_ranks=st.integers(1, 4),
    micro_batch_tokens=st.integers(1, 60),
    pad=st.sampled_from([1, 4]),
    chosen=st.lists(st.sampled_from(range(len(SEQUENCES))), min_size=1, unique=True),
)
def test_no_split_changes_a_step(
    mode: Aggregation, num_ranks: int, micro_batch_tokens: int, pad: int, chosen: list[int]
) -> None:
    total, gradients, metrics, batches = train_on(chosen, mode, num_ranks, micro_batch_tokens, pad)
    whole, expected_gradients, expected_metrics, _ = train_on(chosen, mode, 1, 1000, 1)
    # float32 sums of at most 30 terms of about 1, in another order: 30 * 6e-8.
    assert total == pytest.approx(loss_by_formula(chosen, mode), rel=2e-6, abs=2e-6)
    assert whole == pytest.approx(loss_by_formula(chosen, mode), rel=2e-6, abs=2e-6)
    # Each token's gradient is computed alone, whoever its neighbours in the micro-batch are.
    assert gradients == expected_gradients
    results, expected = ({name: m.result() for name, m in ms.items()} for ms in (metrics, expected_metrics))
    assert results == pytest.approx(expected, rel=2e-6, abs=2e-6)
    assert len({len(batch.micro_batches) for batch in batches}) == 1
    assert len({(batch.counts, batch.num_tokens, batch.imbalance, batch.packing_efficiency) for batch in batches}) == 1


def test_counts_are_of_the_global_batch() -> None:
    # Responses of 4, 9 and 1 tokens; 6 + 9 + 2 positions, whichever rank asks.
    for rank in range(2):
        batch = MiniBatch.of(SEQUENCES, [0, 1, 2], groups(rank, 2), micro_batch_tokens=100, pad_to_multiple=1)
        assert (batch.counts.num_tokens, batch.counts.num_sequences, batch.num_tokens) == (14.0, 3.0, 17)
        # One rank gets the 9, the other 6 + 2 = 8: micro-batches of 9 and 8 take as long as two of 9; the fuller has 9
        # of 8.5.
        assert batch.packing_efficiency == pytest.approx(17 / 18)
        assert batch.imbalance == pytest.approx(9 / 8.5 - 1)


def test_a_sequence_without_trained_tokens_is_not_counted() -> None:
    silent = TrainingSequence(np.array([1, 2, 3]), np.zeros(2, dtype=np.float32), SEQUENCES[2].per_token)
    batch = MiniBatch.of([silent, SEQUENCES[2]], [0, 1], groups(0, 1), micro_batch_tokens=100, pad_to_multiple=1)
    assert (batch.counts.num_tokens, batch.counts.num_sequences) == (1.0, 1.0)


def spread_micro_batch(**overrides: Any) -> MicroBatch:
    """Sequences 4 and 2 of a step, of 3 and 2 positions, and one token of padding."""
    tensors = dict(
        tokens=torch.zeros(6, dtype=torch.int64),
        labels=torch.zeros(6, dtype=torch.int64),
        loss_mask=torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        position_ids=torch.tensor([0, 1, 2, 0, 1, 0]),
        cu_seqlens=torch.tensor([0, 3, 5, 6], dtype=torch.int32),
        max_seqlen=3,
        per_token={},
        sequence_ids=(4, 2),
    )
    return MicroBatch(**(tensors | overrides))


def as_list(values: Tensor) -> list[float]:
    assert values.dtype is torch.float32
    return values.tolist()


def test_spread_gives_each_sequence_its_value_on_trained_tokens() -> None:
    values = [9.0, 9.0, -0.5, 9.0, 2.0]  # by number of the sequence in the step
    assert as_list(spread(spread_micro_batch(), values)) == [0.0, 2.0, 2.0, -0.5, -0.5, 0.0]


def test_spread_of_a_micro_batch_that_is_padding_alone() -> None:
    """What a rank without work runs, so that the others' collectives find it."""
    micro_batch = spread_micro_batch(
        loss_mask=torch.zeros(4), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), sequence_ids=()
    )
    assert as_list(spread(micro_batch, [7.0])) == [0.0, 0.0, 0.0, 0.0]
