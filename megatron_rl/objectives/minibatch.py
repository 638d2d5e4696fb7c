"""One optimizer step's sequences: this rank's micro-batches and the counts that the loss is divided by.

Every rank knows all sequences of the global batch, so the layout of micro-batches and the global counts are plain
functions of them; no collective is needed, and no rank can disagree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import GlobalCounts
from megatron_rl.data.packing import MicroBatch, imbalance, pack, packing_efficiency, plan_micro_batches
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.parallel.groups import Groups


@dataclass(frozen=True)
class MiniBatch:
    """The global batch of one optimizer step, as this rank sees it."""

    micro_batches: list[MicroBatch]
    """This data-parallel rank's micro-batches; as many on every rank."""
    counts: GlobalCounts
    """Trained tokens and sequences of the global batch."""
    num_tokens: int
    """All tokens of the global batch, trained or not."""
    lengths: tuple[int, ...]
    """Tokens of each sequence of the global batch."""
    packing_efficiency: float
    """Real tokens / tokens of the micro-batches if all were as long as the longest."""
    imbalance: float
    """Tokens of the fullest data-parallel rank / mean - 1."""

    @staticmethod
    def of(
        sequences: Sequence[TrainingSequence],
        indices: Sequence[int],
        groups: Groups,
        *,
        micro_batch_tokens: int,
        pad_to_multiple: int,
        num_micro_batches_multiple: int = 1,
        together: int = 1,
        cost: Callable[[int], float] | None = None,
    ) -> "MiniBatch":
        """Lay out the sequences at `indices`; a micro-batch's `sequence_ids` are positions in `sequences`.

        Args:
            sequences: of the whole step, the same on all ranks.
            indices: which of them the optimizer step takes.
            groups: this rank's.
            micro_batch_tokens: most tokens of a micro-batch.
            pad_to_multiple: micro-batches are filled up to a multiple of this.
            num_micro_batches_multiple, cost: see `plan_micro_batches`.
            together: this many neighbours among the indices stay in one micro-batch, in their order: 2 for pairs.
        """
        units = [indices[start : start + together] for start in range(0, len(indices), together)]
        lengths = [sum(sequences[i].num_positions for i in unit) for unit in units]
        plan = plan_micro_batches(
            lengths,
            num_ranks=groups.dp.size(),
            micro_batch_tokens=micro_batch_tokens,
            num_micro_batches_multiple=num_micro_batches_multiple,
            cost=cost,
        )
        mine = [[i for number in micro_batch for i in units[number]] for micro_batch in plan[groups.dp.rank()]]
        masks = [float(sequences[i].loss_mask.sum()) for i in indices]
        return MiniBatch(
            micro_batches=[pack(sequences, micro_batch, pad_to_multiple=pad_to_multiple) for micro_batch in mine],
            counts=GlobalCounts(num_tokens=sum(masks), num_sequences=float(np.count_nonzero(masks))),
            num_tokens=sum(lengths),
            lengths=tuple(sequences[i].num_positions for i in indices),
            packing_efficiency=packing_efficiency(plan, lengths, pad_to_multiple=pad_to_multiple),
            imbalance=imbalance(plan, lengths),
        )


def spread(micro_batch: MicroBatch, values: Sequence[float]) -> Tensor:
    """[T] float32: each sequence's value on its trained tokens, 0 elsewhere. `values` is indexed by sequence id."""
    spans = micro_batch.cu_seqlens.diff().tolist()
    of_sequences = [values[i] for i in micro_batch.sequence_ids]
    padding = [0.0] * (len(spans) - len(of_sequences))
    whole = torch.tensor([*of_sequences, *padding], dtype=torch.float32)
    return whole.repeat_interleave(torch.tensor(spans)) * micro_batch.loss_mask
