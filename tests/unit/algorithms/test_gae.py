"""Returns and generalised advantages against their definition, by hand and by a loop over every token."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.advantages import discounted_returns, generalized_advantages

NAN = float("nan")
# Sequence 0: a prompt, a token, tool output, two tokens. Sequence 1: two tokens. Then padding.
MASK = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
CU_SEQLENS = torch.tensor([0, 5, 7], dtype=torch.int32)
REWARDS = torch.tensor([NAN, 1.0, NAN, 2.0, 4.0, 8.0, 16.0, NAN])
VALUES = torch.tensor([NAN, 0.5, NAN, 1.0, 2.0, 4.0, 3.0, NAN])
TRAINED = MASK > 0


def by_definition(
    rewards: list[float], values: list[float], gamma: float, lam: float, last: float
) -> tuple[list[float], list[float]]:
    """A_k = sum_l (gamma lam)^l delta_{k+l}, term by term; of the steps of one episode."""
    following = [*values[1:], last][: len(values)]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    advantages = [
        sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[k:])) for k in range(len(deltas))
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def random_micro_batch(seed: int, num_sequences: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards, values, mask, cu_seqlens of a micro-batch with gaps; masked tokens are nan."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 40, (num_sequences,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    size = int(cu_seqlens[-1]) + 3
    mask = (torch.rand(size, generator=generator) < 0.7).float()
    mask[-3:] = 0
    rewards, values = torch.randn(2, size, generator=generator)
    return rewards.where(mask > 0, NAN), values.where(mask > 0, NAN), mask, cu_seqlens


def test_returns_by_hand_across_the_gap() -> None:
    # gamma 1/2: 4, 2 + 4/2, 1 + 4/2 (the tool's token is no step); 16, 8 + 16/2
    assert discounted_returns(REWARDS, MASK, CU_SEQLENS, gamma=0.5).tolist() == [0, 3, 0, 4, 4, 16, 16, 0]


def test_advantages_by_hand_across_the_gap() -> None:
    # gamma 1/2, lam 1/2. Deltas 1 + 1/2 - 1/2 = 1, 2 + 1 - 1 = 2, 4 - 2 = 2; 8 + 3/2 - 4 = 5.5, 16 - 3 = 13.
    # Sums with factor 1/4: 2, 2 + 2/4, 1 + 2.5/4; 13, 5.5 + 13/4.
    advantages, returns = generalized_advantages(REWARDS, VALUES, MASK, CU_SEQLENS, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0, 1.625, 0, 2.5, 2, 8.75, 13, 0]
    assert returns.tolist() == [0, 2.125, 0, 3.5, 4, 12.75, 16, 0]


def test_treating_the_tool_as_a_step_would_be_caught() -> None:
    everything = torch.ones(7).where(torch.arange(7) > 0, 0.0)
    wrong = generalized_advantages(
        REWARDS[:7].nan_to_num(0), VALUES[:7].nan_to_num(0), everything, CU_SEQLENS, gamma=0.5, lam=0.5
    )[0]
    assert float(wrong[1]) != 1.625


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_against_the_definition(seed: int, gamma: float, lam: float, bootstrapped: bool) -> None:
    rewards, values, mask, cu_seqlens = random_micro_batch(seed)
    last = torch.arange(1.0, len(cu_seqlens)) if bootstrapped else torch.zeros(len(cu_seqlens) - 1)
    advantages, returns = generalized_advantages(
        rewards, values, mask, cu_seqlens, gamma=gamma, lam=lam, bootstrap_values=last if bootstrapped else None
    )
    exact = {"atol": 1e-6, "rtol": 2e-6}  # the definition in float64; results are rounded to float32, 6e-8 of up to 40
    for i, (first, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        steps = first + torch.nonzero(mask[first:end]).flatten()
        expected = by_definition(rewards[steps].tolist(), values[steps].tolist(), gamma, lam, float(last[i]))
        torch.testing.assert_close(advantages[steps], torch.tensor(expected[0]), **exact)
        torch.testing.assert_close(returns[steps], torch.tensor(expected[1]), **exact)
    assert not advantages[mask == 0].any()
    assert not returns[mask == 0].any()


def test_lambda_0_is_the_one_step_error_and_lambda_1_monte_carlo() -> None:
    td, _ = generalized_advantages(REWARDS, VALUES, MASK, CU_SEQLENS, gamma=0.5, lam=0.0)
    assert td.tolist() == [0, 1, 0, 2, 2, 5.5, 13, 0]  # the deltas above
    mc, target = generalized_advantages(REWARDS, VALUES, MASK, CU_SEQLENS, gamma=0.5, lam=1.0)
    returns = discounted_returns(REWARDS, MASK, CU_SEQLENS, gamma=0.5)
    assert torch.equal(target, returns)  # small binary fractions: nothing is rounded
    assert torch.equal(mc[TRAINED], (returns - VALUES)[TRAINED])


def test_a_perfect_critic_leaves_no_advantage() -> None:
    returns = discounted_returns(REWARDS, MASK, CU_SEQLENS, gamma=0.5)
    for lam in (0.0, 0.7, 1.0):
        advantages, _ = generalized_advantages(REWARDS, returns, MASK, CU_SEQLENS, gamma=0.5, lam=lam)
        assert not advantages.any()


def test_the_packing_does_not_matter() -> None:
    rewards, values, mask, cu_seqlens = random_micro_batch(9)
    whole, _ = generalized_advantages(rewards, values, mask, cu_seqlens, gamma=0.99, lam=0.9)
    for first, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone, _ = generalized_advantages(
            *(part[first:end] for part in (rewards, values, mask)), torch.tensor([0, end - first]), gamma=0.99, lam=0.9
        )
        # Doubling stops earlier in a shorter micro-batch; the terms and their order are the same.
        assert torch.equal(alone, whole[first:end])


def test_an_unmasked_nan_is_seen_in_its_own_sequence_alone() -> None:
    rewards = REWARDS.clone()
    rewards[5] = NAN
    advantages, returns = generalized_advantages(rewards, VALUES, MASK, CU_SEQLENS, gamma=1.0, lam=1.0)
    assert math.isnan(float(advantages[5]))
    assert torch.isfinite(advantages[:5]).all()
    assert torch.isfinite(returns[:5]).all()
    assert float(advantages[6]) == 13.0


def test_a_micro_batch_without_trained_tokens() -> None:
    nothing = torch.zeros(3)
    assert not discounted_returns(nothing, nothing, torch.tensor([0, 3]), gamma=1.0).any()
    assert not generalized_advantages(nothing, nothing, nothing, torch.tensor([0, 3]), gamma=1.0, lam=1.0)[0].any()
