"""From rewards to advantages: of completions, against their group, the batch or the past; and of tokens (GAE).

Of completions. A group is the set of completions with equal id (of one prompt), in any order and of any size: nothing
here reshapes. Arithmetic is float64, in which a sum of equal float32 rewards is exact, so that a group without contrast
gets exactly 0 and not a rounding error that a tiny standard deviation would blow up. Which of them bias the policy
gradient, E[A grad log pi] against the gradient of E[reward] (tests/theory shows each):

    leave one out               unbiased: the baseline of a completion does not depend on it
    group mean                  (K - 1)/K times the unbiased one, for groups of K: a matter of the learning rate
    ... over the group's std    biased: prompts are weighed by 1/std, and the std depends on the completion itself
    running baseline            unbiased, if it is of the steps before
    whitening over the batch    biased by a part that vanishes with the batch: one scale for all prompts

Of tokens: Monte Carlo, TD(0) and everything between. The steps of an episode are the *trained* tokens of its sequence,
in order. Tokens with mask 0 in between, such as a tool's output, are part of the next state and no steps of their own:
nothing is discounted over them, their values are not read, and credit passes across them. `values[t]` is the value of
the state in which token t was chosen, so values, rewards, log-probs and the mask are aligned: one number per decision.
Rewards on masked tokens count for nothing; put an episode's reward on its last trained token (`reward_shaping`). The
recurrence A_k = delta_k + gamma lambda A_{k+1} runs over all sequences of a micro-batch at once by doubling: log2(T)
vector operations, no loop over tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import sequence_of_tokens
from megatron_rl.algorithms.metrics import Moments


@dataclass(frozen=True)
class Groups:
    """Completions by group."""

    index: Tensor
    """[N] int64: each completion's group, 0 to G - 1."""
    sizes: Tensor
    """[G] float64."""

    @staticmethod
    def of(rewards: Tensor, group_ids: Tensor) -> "Groups":
        """Args:
            rewards: [N], finite: one that is not would reach every completion of its group.
            group_ids: [N] int64.

        Raises:
            ValueError: the shapes differ, or a reward is not finite.
        """
        if rewards.shape != group_ids.shape or rewards.dim() != 1:
            raise ValueError(f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both be [N]")
        bad = torch.nonzero(~torch.isfinite(rewards)).flatten()
        if len(bad) > 0:
            first = int(bad[0])
            raise ValueError(
                f"rewards[{first}] is {float(rewards[first])} (group {int(group_ids[first])}); must be finite"
            )
        unique_ids, index = torch.unique(group_ids, return_inverse=True)
        return Groups(index, torch.bincount(index, minlength=len(unique_ids)).double())

    def means(self, values: Tensor) -> Tensor:
        """[N] float64: the mean of its group, for each completion."""
        return (torch.zeros_like(self.sizes).index_add(0, self.index, values) / self.sizes)[self.index]


def group_relative_advantages(
    rewards: Tensor, group_ids: Tensor, *, normalize_by_std: bool, std_epsilon: float, std_correction: int = 1
) -> Tensor:
    """Advantage of each completion over the mean of its group.

        A_i = r_i - mean_g                       (Dr.GRPO)
        A_i = (r_i - mean_g) / (std_g + eps)     (GRPO, normalize_by_std)

    where std_g = sqrt(sum((r_j - mean_g)^2) / (K - std_correction)) over a group of K: with 1 Bessel's, which verl, TRL
    and OpenRLHF compute (torch.std), with 0 the population's. A group of one, and a group of equal rewards, has
    advantage exactly 0.

    Source: GRPO, arXiv:2402.03300, section 4.1.2; without the division: Dr.GRPO, arXiv:2503.20783, section 3.2.

    Args:
        rewards: [N] float32, one per completion, finite.
        group_ids: [N] int64. Completions of equal id form a group.
        normalize_by_std: divide by the group's standard deviation.
        std_epsilon: added to the standard deviation, >= 0, in units of reward.
        std_correction: 0 or 1.

    Returns:
        [N] float32.

    Raises:
        ValueError: the shapes differ, or a reward is not finite.
    """
    groups = Groups.of(rewards, group_ids)
    values = rewards.detach().double()
    deviations = values - groups.means(values)
    if normalize_by_std:
        size = groups.sizes[groups.index]
        std = (groups.means(deviations.square()) * size / (size - std_correction).clamp(min=1)).sqrt()
        deviations = torch.where(deviations == 0, 0.0, deviations / (std + std_epsilon))
    return deviations.float()


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Advantage of each completion over the mean of the *others* of its group (RLOO).

        A_i = r_i - sum_{j != i} r_j / (K - 1) = K / (K - 1) (r_i - mean_g)

    A group of one has nobody to compare with: its advantage is 0.

    Source: Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740, eq. 5.

    Args, Returns, Raises:
        As `group_relative_advantages`.
    """
    groups = Groups.of(rewards, group_ids)
    values = rewards.detach().double()
    size = groups.sizes[groups.index]
    return ((values - groups.means(values)) * size / (size - 1).clamp(min=1)).float()


def length_weighted_advantages(rewards: Tensor, group_ids: Tensor, lengths: Tensor) -> Tensor:
    """Advantage of each completion over the mean reward of its group, weighed by length (OPO).

        A_i = r_i - sum_j l_j r_j / sum_j l_j

    The baseline of least variance, where the squared norm of a completion's score grows with its length.

    Source: OPO, arXiv:2505.23585, section 3.2.

    Args:
        rewards: [N] float32, one per completion, finite.
        group_ids: [N] int64. Completions of equal id form a group.
        lengths: [N], trained tokens of each completion, > 0.

    Returns, Raises:
        As `group_relative_advantages`.
    """
    groups = Groups.of(rewards, group_ids)
    values, weights = rewards.detach().double(), lengths.double()
    deviations = values - groups.means(values)  # from the mean first: equal rewards then give exactly 0
    return (deviations - groups.means(deviations * weights) / groups.means(weights)).float()


def informative(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool: whether the completion's group has two different rewards, so that any advantage is not 0.

    DAPO samples until the batch is full of such groups (dynamic sampling, arXiv:2503.14476, section 3.2: accuracy
    neither 0 nor 1). Arguments and errors as `group_relative_advantages`.
    """
    groups = Groups.of(rewards, group_ids)
    high = rewards.new_full(groups.sizes.shape, -torch.inf).scatter_reduce(0, groups.index, rewards, "amax")
    low = rewards.new_full(groups.sizes.shape, torch.inf).scatter_reduce(0, groups.index, rewards, "amin")
    return (high > low)[groups.index]


def whiten(values: Tensor, mask: Tensor, moments: Moments, *, subtract_mean: bool = True, epsilon: float) -> Tensor:
    """Values in units of the batch's standard deviation: (v - mean) / (std + epsilon).

    The moments are of the *global* batch: those of every rank's tokens (or completions), added up. REINFORCE++ takes
    them over all tokens of the batch, for token-level advantages; REINFORCE++-baseline after the group's mean is
    subtracted. It is biased in a finite batch, since the statistics contain the
    completion itself, and the bias is O(1 / batch), while that of a group's own std does not vanish with the batch.

    Source: REINFORCE++, arXiv:2501.03262, eq. 8 and 9.

    Args:
        values: [T] or [N]. Constant in the gradient.
        mask: same shape; where it is 0 the result is 0, whatever the value is.
        moments: of the global batch.
        subtract_mean: False only scales.
        epsilon: added to the standard deviation, >= 0.

    Returns:
        float32, same shape. A spread of 0 is no scale: values that are all equal are centred alone, or left as they
        are. So are values that differ by less than float32 can say of their mean, which is rounding.
    """
    centred = torch.where(mask != 0, values.detach(), moments.mean).double() - (moments.mean if subtract_mean else 0.0)
    has_spread = moments.std > torch.finfo(torch.float32).eps * abs(moments.mean)
    scaled = centred / (moments.std + epsilon) if has_spread else centred
    return torch.where(mask != 0, scaled, 0.0).float()


@dataclass(frozen=True)
class RunningBaseline:
    """Mean reward of the steps before: the constant baseline of REINFORCE.

        b <- mean of the first step's rewards,   then   b <- decay b + (1 - decay) mean

    A step's own rewards enter after its advantages are taken: a baseline that contains the completion's own reward
    would shrink the gradient by that share. The state is two numbers and belongs in the checkpoint.

    Source: Williams 1992, doi:10.1007/BF00992696, section 5 (reinforcement comparison).
    """

    mean: float = 0.0
    num_steps: int = 0

    def advantages(self, rewards: Tensor) -> Tensor:
        """[N] float32: rewards minus the baseline, which is 0 in the first step."""
        return (rewards.detach().double() - self.mean).float()

    def after(self, reward_sum: float, reward_count: float, *, decay: float) -> "RunningBaseline":
        """The baseline of the next step, from the sum and the count of this step's rewards over all ranks."""
        if reward_count == 0:
            return self
        mean = reward_sum / reward_count
        return RunningBaseline(
            mean if self.num_steps == 0 else decay * self.mean + (1 - decay) * mean, self.num_steps + 1
        )


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
