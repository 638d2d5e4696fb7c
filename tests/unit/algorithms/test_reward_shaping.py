"""Rewards on tokens: at the end, at the ends of steps, spread over steps, and what length and KL take off."""

import math

import pytest
import torch

from megatron_rl.algorithms.advantages import discounted_returns, group_relative_advantages
from megatron_rl.algorithms.aggregation import sequence_sums
from megatron_rl.algorithms.reward_shaping import (
    kl_in_rewards,
    on_scale,
    overlong_penalty,
    rewards_at_step_ends,
    rewards_of_progress,
    rewards_spread_over_steps,
    terminal_rewards,
)

NAN = float("nan")
# Sequence 0: a prompt, four tokens, the last but one a tool's; sequence 1: two tokens; sequence 2: a prompt.
MASK = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
CU_SEQLENS = torch.tensor([0, 5, 7, 8], dtype=torch.int32)


def test_the_reward_of_a_completion_is_on_its_last_trained_token() -> None:
    got = terminal_rewards(torch.tensor([5.0, 7.0, 9.0]), MASK, CU_SEQLENS)
    assert got.tolist() == [0, 0, 0, 0, 5, 0, 7, 0, 0]
    # The last token is a tool's: the one before it gets the reward.
    mask = MASK.clone()
    mask[4] = 0
    assert terminal_rewards(torch.tensor([5.0, 7.0, 9.0]), mask, CU_SEQLENS).tolist() == [0, 0, 5, 0, 0, 0, 7, 0, 0]


SCORES = torch.tensor([NAN, NAN, 6.0, 4.0, 3.0, 8.0, NAN, 1.0, 1.0])
STEP_ENDS = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])


def test_process_rewards_by_hand() -> None:
    # Steps: tokens {1, 2} score 6; {4} (3 is a tool's) score 3; {5} score 8; 6 is after the last step.
    assert rewards_at_step_ends(SCORES, STEP_ENDS, MASK).tolist() == [0, 0, 6, 0, 3, 8, 0, 0, 0]
    assert rewards_spread_over_steps(SCORES, STEP_ENDS, MASK, CU_SEQLENS).tolist() == [0, 3, 3, 0, 3, 8, 0, 0, 0]
    # 3 after 6 is a step back; the next sequence starts from 0 again.
    assert rewards_of_progress(SCORES, STEP_ENDS, MASK, CU_SEQLENS).tolist() == [0, 0, 6, 0, -3, 8, 0, 0, 0]
    assert rewards_of_progress(SCORES, torch.zeros(9), MASK, CU_SEQLENS).tolist() == [0] * 9


def test_progress_pays_no_length_and_a_sum_does() -> None:
    """One mistake, then nothing but it: each token more costs the sum, and progress adds up to the last score."""
    right_so_far = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1])
    mask, cu_seqlens = torch.ones(7), torch.tensor([0, 2, 7], dtype=torch.int32)
    short, long = sequence_sums(rewards_of_progress(right_so_far, mask, mask, cu_seqlens), mask, cu_seqlens)
    assert short == pytest.approx(0.1)
    assert long == pytest.approx(0.1, abs=1e-6)  # differences of float32
    logs = rewards_at_step_ends(right_so_far.log(), mask, mask)
    short, long = sequence_sums(logs, mask, cu_seqlens)
    assert short - long == pytest.approx(-3 * math.log(0.1), rel=1e-6)


def test_spreading_keeps_each_sequences_total() -> None:
    generator = torch.Generator().manual_seed(0)
    mask, ends = (torch.rand(2, 60, generator=generator) < torch.tensor([[0.8], [0.3]])).float()
    scores, cu_seqlens = torch.randn(60, generator=generator), torch.tensor([0, 17, 40, 60], dtype=torch.int32)
    at_ends = sequence_sums(rewards_at_step_ends(scores, ends, mask), mask, cu_seqlens)
    spread = sequence_sums(rewards_spread_over_steps(scores, ends, mask, cu_seqlens), mask, cu_seqlens)
    torch.testing.assert_close(spread, at_ends, atol=1e-6, rtol=0)  # float32 parts of up to 20 tokens


def test_a_step_does_not_reach_into_the_next_sequence() -> None:
    # Sequence 0 ends without a step's end; its tokens get nothing, and sequence 1's step is its own.
    got = rewards_spread_over_steps(
        torch.tensor([0.0, 0.0, 0.0, 4.0]),
        torch.tensor([0.0, 0.0, 0.0, 1.0]),
        torch.ones(4),
        torch.tensor([0, 2, 4], dtype=torch.int32),
    )
    assert got.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_group_relative_process_rewards() -> None:
    # Two completions of one prompt, with step scores {1, 3} and {2}: mean 2, deviations -1, 1 and 0. A token's
    # advantage is the sum over its step and those after it: 0, 0, 1 and 0.
    normalised = group_relative_advantages(
        torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 0]), normalize_by_std=False, std_epsilon=0.0
    )
    ends = torch.tensor([0.0, 1.0, 1.0, 1.0])
    scores = torch.zeros(4).index_put((ends.nonzero().flatten(),), normalised)
    rewards = rewards_at_step_ends(scores, ends, torch.ones(4))
    got = discounted_returns(rewards, torch.ones(4), torch.tensor([0, 3, 4], dtype=torch.int32), gamma=1.0)
    assert got.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_logits_on_other_scales() -> None:
    # sigmoid(ln 3) = 3/4; the log-probabilities of two steps add up to that of both, ln(3/4 * 1/4).
    logits = torch.tensor([3.0, 1 / 3]).log()
    assert on_scale(logits, "score") is logits
    assert on_scale(logits, "probability").tolist() == pytest.approx([0.75, 0.25])
    assert on_scale(logits, "log_probability").sum().exp().item() == pytest.approx(3 / 16)
    assert on_scale(torch.tensor([-1e4, 1e4]), "log_probability").tolist() == [-1e4, 0.0]
    with pytest.raises(ValueError, match="unknown scale 'odds'"):
        on_scale(logits, "odds")


def test_kl_is_taken_off_each_token() -> None:
    got = kl_in_rewards(
        torch.tensor([NAN, 0.0, 1.0]), torch.tensor([1.0, 0.5, -0.5]), torch.tensor([0.0, 1.0, 1.0]), coefficient=0.5
    )
    assert got.tolist() == [0.0, -0.25, 1.25]


def test_overlong_penalty_by_hand() -> None:
    # Limit 10, buffer 4: free up to 6, then -1/4 per token, -1 from 10 on.
    got = overlong_penalty(torch.tensor([0, 6, 7, 9, 10, 25]), max_tokens=10, buffer_tokens=4)
    assert got.tolist() == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    with pytest.raises(ValueError, match=r"buffer_tokens is 0; must be in \(0, max_tokens = 10\]"):
        overlong_penalty(torch.tensor([1]), max_tokens=10, buffer_tokens=0)
