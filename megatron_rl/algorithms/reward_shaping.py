"""From scores of completions and of their steps to one reward per token, and what is taken off for length and for KL.

Group-relative advantages of process rewards (DeepSeekMath, arXiv:2402.03300, section 4.1.3) need nothing of their own:
`group_relative_advantages` over the scores of all *steps*, with the group of each step's completion, then
`rewards_at_step_ends`, then `discounted_returns` with gamma 1.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import sequence_of_tokens


def terminal_rewards(rewards: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each sequence's reward on its last trained token, where an episode is scored as a whole.

    Args:
        rewards: [S] float32. A sequence without trained tokens loses its reward.
        loss_mask: [T], 1 for trained tokens, else 0.
        cu_seqlens: [S + 1] int32.

    Returns:
        [T] float32, 0 elsewhere.
    """
    num_tokens = len(loss_mask)
    position = torch.arange(num_tokens, device=loss_mask.device)
    sequence = sequence_of_tokens(cu_seqlens, num_tokens)
    trained = (loss_mask != 0) & (sequence < len(rewards))
    last = position.new_full((len(rewards) + 1,), -1).scatter_reduce(
        0, torch.where(trained, sequence, len(rewards)), torch.where(trained, position, -1), "amax"
    )
    placed = torch.zeros(num_tokens, dtype=torch.float32, device=loss_mask.device)
    some = last[:-1] >= 0
    return placed.index_put((last[:-1][some],), rewards.detach().float()[some])


def rewards_at_step_ends(scores: Tensor, step_ends: Tensor, loss_mask: Tensor) -> Tensor:
    """Process rewards where they are earned: each step's score on the step's last token, 0 elsewhere.

    Args:
        scores: [T], of a process reward model. Where step_ends is 0 they may be anything.
        step_ends: [T], 1 on the last token of each step, else 0.
        loss_mask: [T], 1 for trained tokens, else 0.

    Returns:
        [T] float32.
    """
    return torch.where((step_ends != 0) & (loss_mask != 0), scores.detach(), 0.0).float()


def rewards_spread_over_steps(scores: Tensor, step_ends: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Process rewards in equal parts on all trained tokens of their steps: step k of n_k tokens gives each s_k / n_k.

    The sum over a step, and so the undiscounted return, is that of `rewards_at_step_ends`. Tokens after the last step's
    end belong to no step and get 0; so do all of a step whose last token is not trained.

    Args:
        scores, step_ends, loss_mask: as in `rewards_at_step_ends`.
        cu_seqlens: [S + 1] int32; no step reaches over a sequence's start.

    Returns:
        [T] float32.
    """
    num_tokens = len(loss_mask)
    ends = (step_ends != 0) & (loss_mask != 0)
    sequence = sequence_of_tokens(cu_seqlens, num_tokens)
    starts = torch.zeros(num_tokens, dtype=torch.bool, device=loss_mask.device)
    starts[1:] = ends[:-1] | (sequence[1:] != sequence[:-1])
    steps = starts.long().cumsum(0)  # number of the step, or of what is left of a sequence after its last
    of_steps = torch.zeros(num_tokens + 1, dtype=torch.float64, device=loss_mask.device)
    tokens = of_steps.index_add(0, steps, (loss_mask != 0).double())
    totals = of_steps.index_add(0, steps, torch.where(ends, scores.detach(), 0.0).double())
    return torch.where(loss_mask != 0, (totals / tokens.clamp(min=1))[steps], 0.0).float()


def rewards_of_progress(scores: Tensor, step_ends: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Process rewards as what each step changed: s_k - s_(k-1) on the last token of step k, the first from 0.

    Where scores say how good a completion is *so far*, their sum counts one mistake in each step after it, so that the
    shortest answer loses least. Their differences add up to the last score, however many steps there are. It is
    potential-based shaping (Ng et al. 1999, theorem 1) with the score as the potential, undiscounted; of steps that are
    judged one by one take `rewards_at_step_ends`.

    Source: process rewards as progress, Setlur et al. 2024, arXiv:2410.08146.

    Args:
        scores, step_ends, loss_mask: as in `rewards_at_step_ends`.
        cu_seqlens: [S + 1] int32; a sequence's first step has none before it.

    Returns:
        [T] float32.
    """
    ends = ((step_ends != 0) & (loss_mask != 0)).nonzero()[:, 0]
    of_steps = scores.detach().float()[ends]
    sequence = sequence_of_tokens(cu_seqlens, len(loss_mask))[ends]
    before = torch.where(sequence[1:] == sequence[:-1], of_steps[:-1], 0.0)
    placed = torch.zeros(len(loss_mask), dtype=torch.float32, device=loss_mask.device)
    return placed.index_put((ends,), torch.cat([of_steps[:1], of_steps[1:] - before]))


def on_scale(scores: Tensor, scale: str) -> Tensor:
    """What a reward model says, as a reward: its score s, or sigmoid(s), or log sigmoid(s).

    Of a model that was trained on right and wrong steps (`preference_loss.process_reward_loss`) s is a logit.
    Summed over steps logits reward length: each further step that looks right adds to them. The log-probabilities of
    the steps add up to that of all of them being right (as Lightman et al. 2023, arXiv:2305.20050, score a solution),
    which no further step raises.

    Args:
        scores: any shape, float.
        scale: 'score', 'probability' or 'log_probability'.

    Returns:
        As scores.

    Raises:
        ValueError: unknown scale.
    """
    if scale == "score":
        return scores
    if scale == "probability":
        return scores.sigmoid()
    if scale == "log_probability":
        return torch.nn.functional.logsigmoid(scores)
    raise ValueError(f"unknown scale {scale!r}; one of 'score', 'probability', 'log_probability'")


def kl_in_rewards(rewards: Tensor, kl: Tensor, loss_mask: Tensor, *, coefficient: float) -> Tensor:
    """Token rewards with the KL penalty taken off each: r_t - coefficient kl_t.

    The right estimator here is k1, log_probs - ref_log_probs of the policy that sampled: a reward is no function of the
    parameters, and the policy gradient of E[-k1] is exactly that of -KL (`kl`). For a whole-completion reward take
    `sequence_sums(kl, ...)` off it.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.

    Args:
        rewards, kl: [T]. Constant in the gradient; masked tokens may hold anything.
        loss_mask: [T], 1 for trained tokens, else 0.
        coefficient: nats to reward.

    Returns:
        [T] float32, 0 on masked tokens.
    """
    penalised = rewards.detach().double() - coefficient * kl.detach().double()
    return torch.where(loss_mask != 0, penalised, 0.0).float()


def overlong_penalty(num_tokens: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """Reward, 0 to -1, for length near the limit, in place of a cliff at it.

        0                                        num_tokens <= max - buffer
        (max - buffer - num_tokens) / buffer     in the buffer
        -1                                       num_tokens > max

    Source: DAPO, arXiv:2503.14476, eq. 13.

    Args:
        num_tokens: [N], tokens of each completion.
        max_tokens: limit of a completion.
        buffer_tokens: length, below the limit, over which the penalty grows; in (0, max_tokens].

    Returns:
        [N] float32.

    Raises:
        ValueError: buffer_tokens outside its range.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens is {buffer_tokens}; must be in (0, max_tokens = {max_tokens}]")
    return ((max_tokens - buffer_tokens - num_tokens.double()) / buffer_tokens).clamp(-1, 0).float()
