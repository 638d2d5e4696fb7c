"""Causal attention for the portable layers, in torch alone: packed sequences, padded batches, context parallelism.

Megatron's local attention takes neither packed nor long sequences (it holds the matrix of scores), nor other channels
for values than for keys. Here there are two ways, both with memory linear in the number of tokens, and in neither does
a token attend across sequences:

- Plain causal attention regroups a micro-batch into a few padded batches of sequences of similar length, so that
  torch's flash-style kernel runs with its causal shortcut. The regrouping is an index, computed once per micro-batch
  for all layers.
- Sliding windows, sinks and context parallelism go through `parallel/interval_attention.py`, which asks of every query
  only which interval of the keys it sees. Context-parallel ranks gather the keys and values of whole micro-batches.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.config.errors import UserError
from megatron_rl.device import this_device
from megatron_rl.parallel.context_parallel import gather_keys, gathered_order, rank_places
from megatron_rl.parallel.interval_attention import interval_attention

# Sequences share a padded batch while the shortest is at least this part of the longest: padding is under a half.
_SHORTEST_IN_BATCH = 0.5


@dataclass(frozen=True)
class _PaddedBatches:
    """Index between a micro-batch of T tokens and padded batches of its sequences."""

    gather: list[Tensor]
    """For each batch [B, L]: the micro-batch's token at each place; padding repeats the sequence's last token."""
    restore: Tensor
    """[T]: for each token of the micro-batch, its place in the concatenated, flattened batches."""

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


@dataclass(frozen=True)
class _Intervals:
    """Which keys of a micro-batch each of this rank's queries sees."""

    first: Tensor
    last: Tensor
    order: Tensor | None
    """[T]: for each token of the micro-batch, its place among the keys that the ranks gathered; None: there is one
    rank."""

    @staticmethod
    def of(cu_seqlens: Tensor, window: int | None, group: ProcessGroup | None) -> "_Intervals":
        device, cu_seqlens = cu_seqlens.device, cu_seqlens.cpu().long()
        lengths = cu_seqlens.diff()
        last = torch.arange(int(cu_seqlens[-1]))
        first = cu_seqlens[:-1].repeat_interleave(lengths)
        if window is not None:
            first = torch.maximum(first, last - window)
        if group is None:
            return _Intervals(first, last, None)
        mine = rank_places(cu_seqlens, group.size(), group.rank())
        return _Intervals(first[mine], last[mine], gathered_order(cu_seqlens, group.size()).to(device))


class PortableAttention(MegatronModule):
    """Core attention of Megatron's self-attention: causal, with grouped queries.

    Built by Megatron's layer spec with its arguments; those not named are not needed here. `config.window_size` (w, 0)
    lets a token see the w tokens before it, on the layers that `window_attn_skip_freq` does not skip;
    `config.softmax_type` 'learnable' adds a sink per head, the parameter `softmax_offset`, and 'off-by-one' one of 0.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raises UserError: dropout where the attention has none."""
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        size = config.context_parallel_size
        self.cp_group: ProcessGroup | None = None
        if size > 1:
            self.cp_group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp
        windowed = config.window_size is not None and is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window: int | None = config.window_size[0] if windowed else None
        self._make_sinks(config)
        self.plain = self.window is None and self.softmax_offset is None and size == 1
        if config.attention_dropout and not self.plain:
            raise UserError(
                f"model.transformer_config.attention_dropout: given {config.attention_dropout}, allowed: 0 with "
                "context parallelism, sliding windows or sinks"
            )

    def _make_sinks(self, config: TransformerConfig) -> None:
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        device = torch.device("cpu") if config.use_cpu_initialization else this_device()
        self.softmax_offset: Tensor | None = None
        if config.softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(heads, dtype=config.params_dtype, device=device)
        elif config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device))
            self.softmax_offset.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.softmax_offset.partition_dim = 0  # type: ignore[attr-defined]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, L, heads, channels] each -> [B, L, heads, value channels]."""
        dropout = self.config.attention_dropout if self.training else 0.0
        channels = value.shape[3]
        scale = self.softmax_scale or query.shape[3] ** -0.5
        # torch's kernels of linear memory take one number of channels; the zeros are computed in vain, and cut off.
        query, key, value = (_with_channels(x, max(query.shape[3], channels)) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)[..., :channels]

    def _attend_intervals(self, query: Tensor, key: Tensor, value: Tensor, intervals: _Intervals) -> Tensor:
        """[T, heads, channels] each -> [T, heads, value channels]."""
        if self.cp_group is not None:
            assert intervals.order is not None
            key, value = (gather_keys(x, self.cp_group).index_select(0, intervals.order) for x in (key, value))
        scale = self.softmax_scale or query.shape[2] ** -0.5
        return interval_attention(
            query, key, value, intervals.first, intervals.last, scale=scale, sinks=self.softmax_offset
        )

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
            key, value: the same with the number of KV heads, the value with channels of its own.
            attention_mask: must be None; the mask is causal, and padding is at the end, where causality hides it.
            packed_seq_params: `cu_seqlens_q` [S + 1] of a micro-batch; None for a padded batch. Under context
                parallelism those of the whole padded micro-batch, of which T tokens are this rank's; see
                `ContextSplit`.

        Returns:
            [T, heads * channels], or [L, B, heads * channels], with the value's channels.
        """
        assert attention_mask is None, "the portable attention is causal"
        assert attention_bias is None, "the portable attention has no bias"
        if packed_seq_params is None:
            return self._padded(query, key, value)
        if not self.plain:
            name = f"intervals_{self.window}"
            intervals = getattr(packed_seq_params, name, None)
            if intervals is None:
                intervals = _Intervals.of(packed_seq_params.cu_seqlens_q, self.window, self.cp_group)
                setattr(packed_seq_params, name, intervals)
            return self._attend_intervals(query, key, value, intervals).flatten(1)
        batches = getattr(packed_seq_params, "padded_batches", None)
        if batches is None:
            batches = packed_seq_params.padded_batches = _PaddedBatches.of(packed_seq_params.cu_seqlens_q)
        out = [
            self._attend(query[index], key[index], value[index]).flatten(0, 1).flatten(1) for index in batches.gather
        ]
        return torch.cat(out).index_select(0, batches.restore)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[L, B, heads, channels] -> [L, B, heads * channels]."""
        assert self.cp_group is None, "context parallelism needs packed sequences"
        if self.plain:
            return self._attend(*(x.transpose(0, 1) for x in (query, key, value))).transpose(0, 1).flatten(2)
        length, batch = query.shape[:2]
        intervals = _Intervals.of(torch.arange(batch + 1) * length, self.window, None)
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out = self._attend_intervals(query, key, value, intervals)
        return out.unflatten(0, (batch, length)).transpose(0, 1).flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks, split over the tensor-parallel ranks, where they are learned."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)


def _with_channels(x: Tensor, channels: int) -> Tensor:
    return x if x.shape[-1] == channels else torch.nn.functional.pad(x, (0, channels - x.shape[-1]))


def packed_seq_params(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """What core's GPTModel takes as `packed_seq_params` of a packed row.

    Args:
        cu_seqlens: [S + 1] int32, bounds of the sequences; under context parallelism of the padded ones.
        max_seqlen: length of the longest of them.
    """
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
