"""Micro-batches hold what was packed, plans hold everything once, and both come near the best possible."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.data.packing import (
    imbalance,
    pack,
    packing_efficiency,
    plan_micro_batches,
    unpack,
)
from megatron_rl.data.samples import TrainingSequence


def sequence(*token_ids: int, prompt: int = 1) -> TrainingSequence:
    mask = np.zeros(len(token_ids) - 1, np.float32)
    mask[prompt - 1 :] = 1
    return TrainingSequence(np.array(token_ids), mask, {"advantages": np.array(token_ids[1:], np.float32) / 10})


THREE = [sequence(1, 2, 3), sequence(4, 5), sequence(6, 7, 8, 9, prompt=2)]


def test_pack_lays_sequences_out_in_the_order_of_the_indices() -> None:
    micro_batch = pack(THREE, [2, 0], pad_to_multiple=4)
    # 3 + 2 positions, filled up to 8 by a third sequence of 3.
    assert micro_batch.tokens.tolist() == [6, 7, 8, 1, 2, 0, 0, 0]
    assert micro_batch.labels.tolist() == [7, 8, 9, 2, 3, 0, 0, 0]
    assert micro_batch.loss_mask.tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert micro_batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert micro_batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert micro_batch.max_seqlen == 3
    assert micro_batch.sequence_ids == (2, 0)
    torch.testing.assert_close(
        micro_batch.per_token["advantages"], torch.tensor([0.7, 0.8, 0.9, 0.2, 0.3, 0, 0, 0]), rtol=0, atol=0
    )
    dtypes = [
        micro_batch.tokens.dtype,
        micro_batch.labels.dtype,
        micro_batch.loss_mask.dtype,
        micro_batch.position_ids.dtype,
        micro_batch.cu_seqlens.dtype,
    ]
    assert dtypes == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32]


def test_a_full_micro_batch_has_no_padding_sequence() -> None:
    micro_batch = pack(THREE, [0, 2], pad_to_multiple=5)
    assert micro_batch.cu_seqlens.tolist() == [0, 2, 5]
    assert pack(THREE, [1], pad_to_multiple=1).tokens.tolist() == [4]


def test_an_empty_micro_batch_is_all_padding_with_the_same_keys() -> None:
    micro_batch = pack(THREE, [], pad_to_multiple=4)
    assert micro_batch.tokens.tolist() == [0, 0, 0, 0]
    assert micro_batch.loss_mask.tolist() == [0, 0, 0, 0]
    assert micro_batch.cu_seqlens.tolist() == [0, 4]
    assert (micro_batch.max_seqlen, micro_batch.sequence_ids) == (4, ())
    assert micro_batch.per_token["advantages"].tolist() == [0, 0, 0, 0]
    assert unpack(micro_batch.tokens, micro_batch) == []
    assert pack([], [], pad_to_multiple=2).per_token == {}


def test_unpack_cuts_values_of_any_width_and_keeps_the_gradient() -> None:
    micro_batch = pack(THREE, [2, 1], pad_to_multiple=8)
    values = torch.arange(16.0).reshape(8, 2).requires_grad_()
    first, second = unpack(values, micro_batch)
    assert first.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert second.tolist() == [[6, 7]]
    (gradient,) = torch.autograd.grad(second.sum(), values)
    assert gradient.sum(1).tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="7 values for a micro-batch of 8 tokens"):
        unpack(values[:7], micro_batch)


def test_pack_refuses_sequences_that_do_not_fit_together() -> None:
    bare = TrainingSequence(np.array([1, 2]), np.ones(1, np.float32))
    with pytest.raises(ValueError, match=r"sequence 1 has per_token \[\], the first has \['advantages'\]"):
        pack([THREE[0], bare], [0, 1], pad_to_multiple=1)
    with pytest.raises(ValueError, match="sequence 0: 2 positions, 1 in loss_mask"):
        pack([TrainingSequence(np.array([1, 2, 3]), np.ones(1, np.float32))], [0], pad_to_multiple=1)
    with pytest.raises(ValueError, match="sequence 0: 0 positions"):
        pack([TrainingSequence(np.array([1]), np.ones(0, np.float32))], [0], pad_to_multiple=1)


lengths_lists = st.lists(st.integers(1, 40), max_size=40)


@settings(max_examples=300, deadline=None)
@given(
    lengths=lengths_lists,
    num_ranks=st.integers(1, 6),
    micro_batch_tokens=st.integers(1, 60),
    quadratic=st.booleans(),
)
def test_every_plan_is_complete_even_and_within_the_limit(
    lengths: list[int], num_ranks: int, micro_batch_tokens: int, quadratic: bool
) -> None:
    cost = (lambda length: 3.0 * length + length**2) if quadratic else None
    plan = plan_micro_batches(lengths, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens, cost=cost)
    micro_batches = [micro_batch for rank in plan for micro_batch in rank]
    assert len(plan) == num_ranks
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(len(lengths)))
    assert all(
        len(micro_batch) <= 1 or sum(lengths[i] for i in micro_batch) <= micro_batch_tokens
        for micro_batch in micro_batches
    )
    assert plan == plan_micro_batches(lengths, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens, cost=cost)
    for rank in plan:  # an empty micro-batch only where no other micro-batch could have given one up
        assert [] not in rank or all(len(micro_batch) <= 1 for micro_batch in rank)
    # No rank without work while another has two: it would wait.
    held = [sum(map(len, rank)) for rank in plan]
    assert 0 not in held or max(held) <= 1
    assert 0 < packing_efficiency(plan, lengths) <= 1
    assert imbalance(plan, lengths) >= -1e-12  # max >= mean, up to a rounding of 1/num_ranks


def test_micro_batches_are_even_where_the_limit_allows_and_full_where_it_must() -> None:
    # Six sequences of 10 in micro-batches of at most 40: two micro-batches are needed, and three each is even
    # (first-fit makes 4 + 2).
    (rank,) = plan_micro_batches([10] * 6, num_ranks=1, micro_batch_tokens=40)
    assert [len(micro_batch) for micro_batch in rank] == [3, 3]
    # 6 5 4 3 2 in micro-batches of 10: 20 tokens fit two micro-batches exactly, 6+4 and 5+3+2, which only first-fit
    # finds.
    assert plan_micro_batches([6, 5, 4, 3, 2], num_ranks=1, micro_batch_tokens=10) == [[[0, 2], [1, 3, 4]]]


def test_a_rank_with_fewer_micro_batches_splits_rather_than_runs_empty_ones() -> None:
    # The one long sequence fills a rank: ranks {12} and {6,6}, micro-batches of at most 6, so two micro-batches on the
    # second.
    assert plan_micro_batches([12, 6, 6], num_ranks=2, micro_batch_tokens=6) == [[[0], []], [[1], [2]]]
    # Three sequences for four ranks: the fourth has an empty micro-batch.
    assert plan_micro_batches([5, 6, 7], num_ranks=4, micro_batch_tokens=9) == [[[0]], [[1]], [[2]], [[]]]
    assert plan_micro_batches([], num_ranks=2, micro_batch_tokens=9) == [[[]], [[]]]


def test_costly_micro_batches_come_first() -> None:
    plan = plan_micro_batches([2, 9, 5, 7], num_ranks=1, micro_batch_tokens=9)
    assert plan == [[[1], [0, 2], [3]]]  # 9, 2 + 5, 7; equal ones by index


def test_ranks_are_balanced_by_the_given_cost() -> None:
    # One sequence of 40 attends to 1,600 pairs, 16 sequences of 10 to 1,600 together: equal work, unequal tokens.
    lengths = [40] + [10] * 16
    plan = plan_micro_batches(lengths, num_ranks=2, micro_batch_tokens=160, cost=lambda length: length**2)
    assert sorted(len(i) for rank in plan for i in rank) == [1, 16]
    assert imbalance(plan, lengths) == 160 / 100 - 1
    assert imbalance(plan_micro_batches(lengths, num_ranks=2, micro_batch_tokens=160), lengths) == 0


def test_measures_by_hand() -> None:
    plan = [[[0, 1], [2]], [[3], []]]
    lengths = [3, 2, 4, 1]
    # Micro-batches of 5 4 1 0: 10 tokens in 4 micro-batches of 5. Padded to a multiple of 4, the largest is 8.
    assert packing_efficiency(plan, lengths) == 10 / 20
    assert packing_efficiency(plan, lengths, pad_to_multiple=4) == 10 / 32
    assert imbalance(plan, lengths) == 9 / 5 - 1
    assert (packing_efficiency([[[]]], []), imbalance([[[]], [[]]], [])) == (1.0, 0.0)


def gsm8k_like_lengths(num_samples: int) -> list[int]:
    """Question and solution of GSM8K come to about 200 tokens, log-normally spread."""
    return np.clip(np.random.default_rng(0).lognormal(5.2, 0.45, num_samples), 20, 900).astype(int).tolist()


@pytest.mark.parametrize("num_ranks", [1, 8, 64])
def test_real_lengths_pack_nearly_without_loss(num_ranks: int) -> None:
    lengths = gsm8k_like_lengths(4096)
    plan = plan_micro_batches(lengths, num_ranks=num_ranks, micro_batch_tokens=8192)
    assert imbalance(plan, lengths) < 1e-3
    assert packing_efficiency(plan, lengths) > 0.99
    fewest = -(-sum(lengths) // (num_ranks * 8192))
    assert len(plan[0]) <= fewest + 1


def test_many_short_micro_batches_are_planned() -> None:
    plan = plan_micro_batches([300] * 4096, num_ranks=1, micro_batch_tokens=600)
    assert len(plan[0]) == 2048


@pytest.mark.parametrize(("lengths", "num_ranks", "micro_batch_tokens"), [([1], 0, 1), ([1], 1, 0), ([1, 0], 1, 1)])
def test_impossible_sizes_are_refused(lengths: list[int], num_ranks: int, micro_batch_tokens: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        plan_micro_batches(lengths, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)


def test_micro_batches_come_in_multiples() -> None:
    """Interleaved pipeline stages want as many micro-batches as there are stages, also where fewer would hold
    everything."""
    plan = plan_micro_batches([3, 2, 2], num_ranks=1, micro_batch_tokens=100, num_micro_batches_multiple=2)
    assert plan == [[[1, 2], [0]]]
    assert plan_micro_batches([5], num_ranks=2, micro_batch_tokens=5, num_micro_batches_multiple=2) == [
        [[0], []],
        [[], []],
    ]
