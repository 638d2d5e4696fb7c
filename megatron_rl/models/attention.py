"""Causal attention for the portable layers: torch's own kernels, for packed rows and for padded batches.

Megatron's local attention takes neither packed rows nor long ones (it holds the matrix of scores). Here a packed row
is regrouped into a few padded batches of sequences of similar length, so that torch's flash-style kernel runs with
its causal shortcut, memory is linear in the number of tokens, and no token attends across sequences. The regrouping
is an index, computed once per row and shared by all layers.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# Sequences share a padded batch while the shortest is at least this part of the longest: padding is under a half.
_SHORTEST_IN_BATCH = 0.5


@dataclass(frozen=True)
class _PaddedBatches:
    """Index between a packed row of T tokens and padded batches of its sequences."""

    gather: list[Tensor]
    """For each batch [B, L]: the row's token at each place; padding repeats the sequence's last token."""
    restore: Tensor
    """[T]: for each token of the row, its place in the concatenated, flattened batches."""

    @staticmethod
    def of(cu_seqlens: Tensor) -> "_PaddedBatches":
        bounds = cu_seqlens.tolist()
        spans = sorted(
            ((stop - start, start) for start, stop in pairwise(bounds) if stop > start),
            key=lambda span: -span[0],
        )
        gather: list[Tensor] = []
        restore = torch.empty(bounds[-1], dtype=torch.int64)
        place = first = 0
        while first < len(spans):
            longest = spans[first][0]
            last = first
            while last < len(spans) and spans[last][0] >= _SHORTEST_IN_BATCH * longest:
                last += 1
            lengths, starts = torch.tensor(spans[first:last]).unbind(1)
            column = torch.arange(longest)
            tokens = starts[:, None] + torch.minimum(column, lengths[:, None] - 1)
            real = column < lengths[:, None]
            places = torch.arange(place, place + tokens.numel()).view_as(tokens)
            restore[tokens[real]] = places[real]
            gather.append(tokens.to(cu_seqlens.device))
            place += tokens.numel()
            first = last
        return _PaddedBatches(gather, restore.to(cu_seqlens.device))


class PortableAttention(MegatronModule):
    """Core attention of Megatron's self-attention, causal, with grouped queries.

    Built by Megatron's layer spec with its arguments; those not named are not needed here.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, L, heads, channels] each -> [B, L, heads, channels]."""
        dropout = self.config.attention_dropout if self.training else 0.0
        out = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=dropout,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of every token to itself and the earlier tokens of its sequence.

        Args:
            query: packed [T, heads, channels], or padded [L, B, heads, channels].
            key, value: the same with the number of KV heads.
            attention_mask: must be None; the mask is causal, and padding is at the end, where causality hides it.
            packed_seq_params: `cu_seqlens_q` [S + 1] of a packed row; None for a padded batch.

        Returns:
            [T, heads * channels], or [L, B, heads * channels].
        """
        assert attention_mask is None, "the portable attention is causal"
        assert attention_bias is None, "the portable attention has no bias"
        if packed_seq_params is None:
            return self._attend(*(x.transpose(0, 1) for x in (query, key, value))).transpose(0, 1).flatten(2)
        batches = getattr(packed_seq_params, "padded_batches", None)
        if batches is None:
            batches = packed_seq_params.padded_batches = _PaddedBatches.of(packed_seq_params.cu_seqlens_q)
        out = [
            self._attend(query[index], key[index], value[index]).flatten(0, 1).flatten(1) for index in batches.gather
        ]
        return torch.cat(out).index_select(0, batches.restore)
