"""The process groups of one rank as a value that is passed along, and sums of metrics and counts over their ranks.

`reduce_metrics` and `reduce_counts` gather every rank's values and combine them in rank order. All ranks then have the
same float64 numbers, bit for bit, which a floating-point all-reduce does not promise, and ranks may report different
metrics: a stage without a loss reports none. The values are a few dozen per step; they travel as Python objects, so no
device is involved but the one that the group's backend needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl.algorithms.metrics import Metric, combine


@dataclass(frozen=True)
class Groups:
    """Process groups that this rank belongs to, and its place in them.

    Ranks are laid out tensor-parallel fastest, then context, then data, then pipeline (Megatron's order
    tp-cp-ep-dp-pp). Experts cut the same ranks of a stage anew: expert-tensor fastest, then expert, then expert-data.

    Which group a sum over the batch needs: context-parallel ranks hold parts of the same rows, and each computes the
    loss of whole rows from log-probs that it gathered. So counts of tokens and sequences are summed over `dp`, and
    gradients, of which each rank has its part's, over `dp_cp`.
    """

    world: ProcessGroup
    """All training ranks."""
    tp: ProcessGroup
    """Ranks that share every layer."""
    pp: ProcessGroup
    """Ranks that share the layers, first stage first."""
    dp: ProcessGroup
    """Ranks with the same part of the model and different rows."""
    cp: ProcessGroup
    """Ranks that share the tokens of the same rows."""
    dp_cp: ProcessGroup
    """Ranks with the same part of the model: over these its gradients are summed."""
    ep: ProcessGroup
    """Ranks that share the experts of a layer."""
    etp: ProcessGroup
    """Ranks that share each expert's matrices."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, and so sees log-probs and losses."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def reports(self) -> bool:
        """Whether this rank's metrics count: one rank of each data-parallel replica, on the last stage."""
        return self.is_last_stage and self.tp.rank() == 0 and self.cp.rank() == 0


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
