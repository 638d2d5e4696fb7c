"""Sums over the sequences of a micro-batch, and values spread over their tokens."""

import torch

from megatron_rl.algorithms.aggregation import (
    sequence_lengths,
    sequence_means,
    sequence_of_tokens,
    sequence_sums,
    to_tokens,
)

NAN = float("nan")
CU_SEQLENS = torch.tensor([0, 3, 3, 5], dtype=torch.int32)  # the second has no tokens; two tokens of padding follow
MASK = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
VALUES = torch.tensor([NAN, 2.0, 4.0, 8.0, NAN, 16.0, NAN])


def test_by_hand() -> None:
    assert sequence_of_tokens(CU_SEQLENS, 7).tolist() == [0, 0, 0, 2, 2, 3, 3]
    assert sequence_sums(VALUES, MASK, CU_SEQLENS).tolist() == [6.0, 0.0, 8.0]
    assert sequence_means(VALUES, MASK, CU_SEQLENS).tolist() == [3.0, 0.0, 8.0]
    assert sequence_lengths(MASK, CU_SEQLENS).tolist() == [2.0, 0.0, 1.0]
    assert to_tokens(torch.tensor([5.0, 6.0, 7.0]), CU_SEQLENS, 7).tolist() == [5.0, 5.0, 5.0, 7.0, 7.0, 0.0, 0.0]


def test_gradient_is_the_mask_and_0_elsewhere() -> None:
    values = VALUES.clone().requires_grad_()
    sequence_sums(values, MASK, CU_SEQLENS).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]  # the padding's mask counts for nothing


def test_a_micro_batch_without_tokens() -> None:
    nothing = torch.zeros(0)
    assert sequence_sums(nothing, nothing, torch.zeros(1, dtype=torch.int32)).tolist() == []
    assert to_tokens(nothing, torch.zeros(1, dtype=torch.int32), 2).tolist() == [0.0, 0.0]
