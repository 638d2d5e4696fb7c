"""What of a packed row a rank computes: all of it, or its context-parallel part.

A row is the same on all ranks of a replica, and knows nothing of the layout. Here it is cut, and filled up where the
layout asks for it; what the model gives for the parts is joined again, in the order of the row and without the filling.
So losses see whole rows at any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rl.data.packing import PackedRow
from megatron_rl.device import this_device
from megatron_rl.models.attention import packed_seq_params
from megatron_rl.parallel.context_parallel import ContextSplit, gather_outputs
from megatron_rl.parallel.fused_linear_logits_loss import OfLogits
from megatron_rl.parallel.fused_linear_token_loss import TokenLosses, Tokens
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.vocab_parallel_divergences import ShardedLogits


@dataclass(frozen=True)
class RowPart:
    """A row, and this rank's P slots of it; on this rank's device."""

    number: int
    """Which row it is, the same in every pass over it."""
    row: PackedRow
    """The whole row of T tokens."""
    tokens: Tensor
    """[P]."""
    labels: Tensor
    """[P]; decided on the whole row, so that no rank needs its neighbour's first token."""
    position_ids: Tensor
    """[P]."""
    packed_seq_params: PackedSeqParams
    """Bounds of the sequences, as attention and rotary embedding take them: of the whole row, filled up."""
    is_padding: Tensor | None
    """[P] bool: slots that hold no token of a sequence; None: there are none."""
    slots: Tensor | None
    """[P]: which token of the row each slot is, anything for filling; None: the part is the row."""
    restore: Tensor | None
    """[T]: where each token is when the ranks' parts are joined; None: the part is the row."""

    @property
    def num_tokens(self) -> int:
        """Of the whole row, without padding."""
        return int(self.row.cu_seqlens[len(self.row.sequence_ids)])

    @staticmethod
    def of(row: PackedRow, groups: Groups, *, multiple: int, at_least: int = 0) -> "RowPart":
        """This rank's part: a multiple of `multiple` tokens long, and at least `at_least`."""
        size = groups.cp.size()
        moved = row.to(this_device())
        num_real = int(row.cu_seqlens[len(row.sequence_ids)])
        if size == 1 and len(row.tokens) % multiple == 0 and len(row.tokens) >= at_least:
            params = packed_seq_params(moved.cu_seqlens, row.max_seqlen)
            padding = None
            if num_real < len(row.tokens):
                padding = torch.arange(len(row.tokens), device=this_device()) >= num_real
            return RowPart(id(row), moved, moved.tokens, moved.labels, moved.position_ids, params, padding, None, None)
        split = ContextSplit.of(row.cu_seqlens, size=size, rank=groups.cp.rank(), multiple=multiple, at_least=at_least)
        slots = split.tokens.to(this_device())
        return RowPart(
            number=id(row),
            row=moved,
            tokens=moved.tokens[slots],
            labels=moved.labels[slots],
            position_ids=split.position_ids.to(this_device()),
            packed_seq_params=packed_seq_params(split.cu_seqlens.to(this_device()), split.max_seqlen),
            is_padding=split.is_padding.to(this_device()) | (slots >= num_real),
            slots=slots,
            restore=split.restore.to(this_device()),
        )

    def joined(self, output: Tensor, groups: Groups) -> Tensor:
        """[P] of every rank -> [T], the row's, on every rank. Collective over groups.cp; differentiable."""
        if self.restore is None:
            return output
        whole = gather_outputs(output, groups.cp) if groups.cp.size() > 1 else output
        return whole.index_select(0, self.restore)

    def by_slots(self, of_row: TokenLosses | OfLogits) -> TokenLosses | OfLogits:
        """Losses by tokens of the row -> by slots of the part; filling has loss 0."""
        slots, is_padding = self.slots, self.is_padding
        if slots is None or is_padding is None:
            return of_row
        if isinstance(of_row, OfLogits):
            of_logits = of_row.losses

            def losses(logits: ShardedLogits, some: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
                found, values = of_logits(logits, slots[some])
                return torch.where(is_padding[some], 0.0, found), values

            return OfLogits(losses)
        return lambda log_probs, entropy, some: torch.where(
            is_padding[some], 0.0, of_row(log_probs, entropy, slots[some])
        )


def parts_of_rows(rows: Sequence[PackedRow], groups: Groups, *, multiple: int, equal: bool) -> list[RowPart]:
    """This rank's parts of its rows; see `RowPart.of`.

    With `equal`, parts that replicas compute at the same time are filled up to the longest of them, which a collective
    that takes equal parts needs; collective over groups.dp.
    """
    parts = [RowPart.of(row, groups, multiple=multiple) for row in rows]
    if not equal or groups.dp.size() == 1:
        return parts
    of_ranks: list[list[int]] = [[] for _ in range(groups.dp.size())]
    dist.all_gather_object(of_ranks, [len(part.tokens) for part in parts], group=groups.dp)
    longest = [max(lengths) for lengths in zip(*of_ranks, strict=True)]
    return [
        RowPart.of(row, groups, multiple=multiple, at_least=length) for row, length in zip(rows, longest, strict=True)
    ]
