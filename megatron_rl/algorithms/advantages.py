"""From one reward per completion to one advantage per completion, against the other completions of its prompt.

A group is the set of completions with equal id, in any order and of any size: nothing here reshapes. Arithmetic is
float64, in which a sum of equal float32 rewards is exact, so that a group without contrast gets exactly 0 and not a
rounding error that a tiny standard deviation would blow up.
"""

import torch
from torch import Tensor


def group_relative_advantages(
    rewards: Tensor, group_ids: Tensor, *, normalize_by_std: bool, std_epsilon: float
) -> Tensor:
    """Advantage of each completion over the mean of its group.

        A_i = r_i - mean_g                       (Dr.GRPO)
        A_i = (r_i - mean_g) / (std_g + eps)     (GRPO, normalize_by_std)

    where std_g is the population's: sqrt(mean((r_j - mean_g)^2)) over the group. A group of one, and a group of equal
    rewards, has advantage exactly 0.

    Source: GRPO, arXiv:2402.03300, section 4.1.2; without the division: Dr.GRPO, arXiv:2503.20783, section 3.2.

    Args:
        rewards: [N] float32, one per completion, finite.
        group_ids: [N] int64. Completions of equal id form a group.
        normalize_by_std: divide by the group's standard deviation.
        std_epsilon: added to the standard deviation, >= 0, in units of reward.

    Returns:
        [N] float32.

    Raises:
        ValueError: the shapes differ, or a reward is not finite (it would reach every completion of its group).
    """
    if rewards.shape != group_ids.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both be [N]")
    bad = torch.nonzero(~torch.isfinite(rewards)).flatten()
    if len(bad) > 0:
        first = int(bad[0])
        raise ValueError(f"rewards[{first}] is {float(rewards[first])} (group {int(group_ids[first])}); must be finite")
    unique_ids, group = torch.unique(group_ids, return_inverse=True)
    sizes = torch.bincount(group, minlength=len(unique_ids)).double()

    def group_mean(values: Tensor) -> Tensor:
        return torch.zeros_like(sizes).index_add(0, group, values) / sizes

    values = rewards.detach().double()
    deviations = values - group_mean(values)[group]
    if normalize_by_std:
        std = group_mean(deviations.square()).sqrt()[group]
        deviations = torch.where(deviations == 0, 0.0, deviations / (std + std_epsilon))
    return deviations.float()
