"""What must be known of the whole batch: metrics and counts, combined over the ranks of a group.

Both gather every rank's contribution and combine in rank order. All ranks then hold the same float64 numbers, bit for
bit, which a floating-point all-reduce does not promise, and ranks may report different metrics: a stage without a loss
reports none. The values are a few dozen per step; they travel as Python objects, so no device is involved but the one
that the group's backend needs.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.algorithms.metrics import Metric, combine

T = TypeVar("T")


def reduce_metrics(metrics: dict[str, Metric], group: ProcessGroup | None) -> dict[str, float]:
    """Combine every rank's metrics by their kind; a name that few ranks report is combined over those.

    Collective over group; None: this process alone.

    Returns:
        The combined numbers by name, in alphabetical order; the same on every rank.

    Raises:
        ValueError: a name has different kinds on different ranks; raised on all of them.
    """
    combined: dict[str, Metric] = {}
    for of_rank in _gather(metrics, group):
        combined = combine(combined, of_rank)
    return {name: combined[name].result() for name in sorted(combined)}


def reduce_counts(values: Sequence[float], group: ProcessGroup | None) -> list[float]:
    """Element-wise sum over the ranks, in float64: exact for counts up to 2^53.

    Collective over group; None: this process alone.

    Raises:
        ValueError: the ranks gave sequences of different lengths; raised on all of them.
    """
    gathered = _gather([float(value) for value in values], group)
    if len({len(of_rank) for of_rank in gathered}) > 1:
        raise ValueError(f"ranks gave {[len(of_rank) for of_rank in gathered]} counts; must be equally many")
    return [sum(column) for column in zip(*gathered, strict=True)]


def _gather(value: T, group: ProcessGroup | None) -> list[T]:
    """Every rank's value, in rank order."""
    if group is None:
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered  # type: ignore[return-value]
