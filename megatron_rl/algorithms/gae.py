"""From a reward per token to returns and advantages per token: Monte Carlo, TD(0), and everything between (GAE).

The steps of an episode are the *trained* tokens of its sequence, in order. Tokens with mask 0 in between, such as a
tool's output, are part of the next state and no steps of their own: nothing is discounted over them, their values are
not read, and credit passes across them. `values[t]` is the value of the state in which token t was chosen, so values,
rewards, log-probs and the mask are aligned: one number per decision. Rewards on masked tokens count for nothing; put an
episode's reward on its last trained token (`reward_shaping`).

The recurrence A_k = delta_k + gamma lambda A_{k+1} runs over all sequences of a row at once by doubling: log2(T) vector
operations, no loop over tokens.
"""

import torch
from torch import Tensor

from megatron_rl.algorithms.sequences import sequence_of_tokens


def discounted_returns(rewards: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, *, gamma: float) -> Tensor:
    """Monte-Carlo return of each trained token: G_k = sum_{j >= k} gamma^(j - k) r_j over the steps of its sequence.

    Source: Williams 1992, doi:10.1007/BF00992696; Sutton & Barto 2018, eq. 3.8.

    Args:
        rewards: [T]. Constant in the gradient.
        loss_mask: [T], 1 for trained tokens, else 0.
        cu_seqlens: [S + 1] int32.
        gamma: discount per step, in [0, 1].

    Returns:
        [T] float32, 0 on masked tokens.
    """
    steps, follows, _ = _steps(loss_mask, cu_seqlens)
    returns = _discounted_sums(rewards.detach().double()[steps], follows, gamma)
    return _at(steps, returns, len(loss_mask))


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and the returns that a critic is fitted to.

        delta_k = r_k + gamma V_{k+1} - V_k,     A_k = sum_l (gamma lam)^l delta_{k+l},     R_k = A_k + V_k

    lam = 0 is TD(0), A_k = delta_k (A2C with one step); lam = 1 is Monte Carlo, A_k = G_k - V_k. After the
    last step of an episode V is 0, unless a cut-off episode is given the value of the state that it was cut in.

    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.

    Args:
        rewards: [T]. Constant in the gradient, like the values.
        values: [T]. Of the state in which each token was chosen; masked tokens may hold anything.
        loss_mask: [T], 1 for trained tokens, else 0.
        cu_seqlens: [S + 1] int32.
        gamma: discount per step, in [0, 1].
        lam: lambda, in [0, 1].
        bootstrap_values: [S]; value of the state after each sequence's last step, 0 where the episode ended. None: 0.

    Returns:
        advantages and returns, [T] float32, 0 on masked tokens.
    """
    steps, follows, sequence = _steps(loss_mask, cu_seqlens)
    value = values.detach().double()[steps]
    last = torch.zeros_like(value)
    if bootstrap_values is not None:
        last = bootstrap_values.detach().double()[sequence]
    delta = rewards.detach().double()[steps] + gamma * torch.where(follows, _next(value, 1), last) - value
    advantages = _discounted_sums(delta, follows, gamma * lam)
    return _at(steps, advantages, len(loss_mask)), _at(steps, advantages + value, len(loss_mask))


def _steps(loss_mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the K trained tokens, whether the next of them is of the same sequence, and their sequences; [K]."""
    sequence = sequence_of_tokens(cu_seqlens, len(loss_mask))
    steps = torch.nonzero((loss_mask != 0) & (sequence < len(cu_seqlens) - 1)).flatten()
    sequence = sequence[steps]
    follows = torch.zeros_like(sequence, dtype=torch.bool)
    follows[:-1] = sequence[1:] == sequence[:-1]
    return steps, follows, sequence


def _next(values: Tensor, distance: int) -> Tensor:
    """values shifted to the left by distance, 0 at the end."""
    return torch.cat([values[distance:], values.new_zeros(min(distance, len(values)))])


def _discounted_sums(values: Tensor, follows: Tensor, discount: float) -> Tensor:
    """[K]: s_k = values_k + discount s_{k+1}, where step k + 1 is of the same sequence.

    After the round of distance d, s_k holds the next 2 d terms and c_k = discount^(2 d), or 0 where the sequence ends
    before; a term beyond the end is left out, not multiplied by 0, for it may be nan.
    """
    sums, coefficients, distance = values, discount * follows.double(), 1
    while distance < len(values):
        sums = sums + torch.where(coefficients != 0, coefficients * _next(sums, distance), 0.0)
        coefficients = coefficients * _next(coefficients, distance)
        distance *= 2
    return sums


def _at(steps: Tensor, values: Tensor, num_tokens: int) -> Tensor:
    """[T] float32: the values at the steps' positions, 0 elsewhere."""
    return torch.zeros(num_tokens, dtype=torch.float32, device=values.device).index_put((steps,), values.float())
