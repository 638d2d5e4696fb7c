"""The part of a micro-batch that this rank computes: all of it, or its context-parallel part.

A micro-batch is the same on all ranks of a replica, and knows nothing of the layout. Here it is cut, and padded where
the layout asks for it; what the model gives for the parts is joined again, in the order of the micro-batch and without
the padding. So losses see whole micro-batches at any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rl.data.packing import MicroBatch
from megatron_rl.device import this_device
from megatron_rl.models.attention import packed_seq_params
from megatron_rl.parallel.context_parallel import ContextSplit, gather_outputs
from megatron_rl.parallel.fused_linear_logits_loss import OfLogits
from megatron_rl.parallel.fused_linear_token_loss import TokenLosses, Tokens
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.vocab_parallel_divergences import ShardedLogits


@dataclass(frozen=True)
class MicroBatchPart:
    """A micro-batch, and this rank's P slots of it; on this rank's device."""

    number: int
    """Which micro-batch it is, the same in every pass over it."""
    micro_batch: MicroBatch
    """The whole micro-batch of T tokens."""
    tokens: Tensor
    """[P]."""
    labels: Tensor
    """[P]; decided on the whole micro-batch, so that no rank needs its neighbour's first token."""
    position_ids: Tensor
    """[P]."""
    packed_seq_params: PackedSeqParams
    """Bounds of the sequences, as attention and rotary embedding take them: of the whole micro-batch, filled up."""
    is_padding: Tensor | None
    """[P] bool: slots that hold no token of a sequence; None: there are none."""
    slots: Tensor | None
    """[P]: which token of the micro-batch each slot is, anything for filling; None: the part is the micro-batch."""
    restore: Tensor | None
    """[T]: where each token is when the ranks' parts are joined; None: the part is the micro-batch."""

    @property
    def num_tokens(self) -> int:
        """Of the whole micro-batch, without padding."""
        return int(self.micro_batch.cu_seqlens[len(self.micro_batch.sequence_ids)])

    @staticmethod
    def of(micro_batch: MicroBatch, groups: Groups, *, multiple: int, at_least: int = 0) -> "MicroBatchPart":
        """This rank's part: a multiple of `multiple` tokens long, and at least `at_least`."""
        size = groups.cp.size()
        moved = micro_batch.to(this_device())
        num_real = int(micro_batch.cu_seqlens[len(micro_batch.sequence_ids)])
        if size == 1 and len(micro_batch.tokens) % multiple == 0 and len(micro_batch.tokens) >= at_least:
            params = packed_seq_params(moved.cu_seqlens, micro_batch.max_seqlen)
            padding = None
            if num_real < len(micro_batch.tokens):
                padding = torch.arange(len(micro_batch.tokens), device=this_device()) >= num_real
            return MicroBatchPart(
                id(micro_batch), moved, moved.tokens, moved.labels, moved.position_ids, params, padding, None, None
            )
        split = ContextSplit.of(
            micro_batch.cu_seqlens, size=size, rank=groups.cp.rank(), multiple=multiple, at_least=at_least
        )
        slots = split.tokens.to(this_device())
        return MicroBatchPart(
            number=id(micro_batch),
            micro_batch=moved,
            tokens=moved.tokens[slots],
            labels=moved.labels[slots],
            position_ids=split.position_ids.to(this_device()),
            packed_seq_params=packed_seq_params(split.cu_seqlens.to(this_device()), split.max_seqlen),
            is_padding=split.is_padding.to(this_device()) | (slots >= num_real),
            slots=slots,
            restore=split.restore.to(this_device()),
        )

    def joined(self, output: Tensor, groups: Groups) -> Tensor:
        """[P] of every rank -> [T], the micro-batch's, on every rank. Collective over groups.cp; differentiable."""
        if self.restore is None:
            return output
        whole = gather_outputs(output, groups.cp) if groups.cp.size() > 1 else output
        return whole.index_select(0, self.restore)

    def by_slots(self, of_micro_batch: TokenLosses | OfLogits) -> TokenLosses | OfLogits:
        """Losses by tokens of the micro-batch -> by slots of the part; filling has loss 0."""
        slots, is_padding = self.slots, self.is_padding
        if slots is None or is_padding is None:
            return of_micro_batch
        if isinstance(of_micro_batch, OfLogits):
            of_logits = of_micro_batch.losses

            def losses(logits: ShardedLogits, some: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
                found, values = of_logits(logits, slots[some])
                return torch.where(is_padding[some], 0.0, found), values

            return OfLogits(losses)
        return lambda log_probs, entropy, some: torch.where(
            is_padding[some], 0.0, of_micro_batch(log_probs, entropy, slots[some])
        )


def parts_of_micro_batches(
    micro_batches: Sequence[MicroBatch], groups: Groups, *, multiple: int, equal: bool
) -> list[MicroBatchPart]:
    """This rank's parts of its micro-batches; see `MicroBatchPart.of`.

    With `equal`, parts that replicas compute at the same time are filled up to the longest of them, which a collective
    that takes equal parts needs; collective over groups.dp.
    """
    parts = [MicroBatchPart.of(micro_batch, groups, multiple=multiple) for micro_batch in micro_batches]
    if not equal or groups.dp.size() == 1:
        return parts
    of_ranks: list[list[int]] = [[] for _ in range(groups.dp.size())]
    dist.all_gather_object(of_ranks, [len(part.tokens) for part in parts], group=groups.dp)
    longest = [max(lengths) for lengths in zip(*of_ranks, strict=True)]
    return [
        MicroBatchPart.of(micro_batch, groups, multiple=multiple, at_least=length)
        for micro_batch, length in zip(micro_batches, longest, strict=True)
    ]
