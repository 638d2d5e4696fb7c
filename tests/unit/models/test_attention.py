"""Packed attention against each sequence alone, in float64, values and gradients."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig

from megatron_rl.config.errors import UserError
from megatron_rl.models.attention import PortableAttention, _PaddedBatches

HEADS, CHANNELS = 4, 8
# float32 roundings, 1.2e-7 each, over sums of up to 13 products of size 1.
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}


def make_attention(
    softmax_scale: float | None = None, *, layer_number: int = 1, v_channels: int | None = None, **fields: Any
) -> PortableAttention:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        use_cpu_initialization=True,
        **{"attention_dropout": 0.0} | fields,
    )
    return PortableAttention(
        config, layer_number=layer_number, softmax_scale=softmax_scale, k_channels=CHANNELS, v_channels=v_channels
    ).eval()


def packed(lengths: list[int]) -> PackedSeqParams:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


def draw(num_tokens: int, num_groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return [torch.randn(num_tokens, heads, CHANNELS, generator=generator) for heads in (HEADS, num_groups, num_groups)]


def softmax_attention(query, key, value, lengths, scale, *, sliding_window=10**6, sinks=None):
    """softmax(scale q k^T + causal mask) v of each sequence and head; query head h reads group h * groups / heads.

    A token sees `sliding_window` tokens, itself among them; a sink is a logit that takes its part of the softmax.
    """
    out = torch.zeros(*query.shape[:2], value.shape[2], dtype=query.dtype)
    for start, stop in pairwise([0, *accumulate(lengths)]):
        ones = torch.ones(stop - start, stop - start, dtype=torch.bool)
        future = ones.triu(1) | ones.tril(-sliding_window)
        for head in range(HEADS):
            group = head * key.shape[1] // HEADS
            scores = scale * query[start:stop, head] @ key[start:stop, group].T
            scores = scores.masked_fill(future, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].expand(stop - start, 1)], dim=1)
            out[start:stop, head] = scores.softmax(-1)[:, : stop - start] @ value[start:stop, group]
    return out.flatten(1)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[13], [1], [3, 9, 1, 4, 8, 2, 5], [6, 6, 6]], ids=str)
@pytest.mark.parametrize("softmax_scale", [None, 0.7])
def test_packed_micro_batches_against_softmax_attention_of_each_sequence(num_groups, lengths, softmax_scale):
    inputs = [tensor.requires_grad_() for tensor in draw(sum(lengths), num_groups)]
    upstream = torch.linspace(-1, 1, sum(lengths) * HEADS * CHANNELS).view(sum(lengths), -1)
    out = make_attention(softmax_scale)(*inputs, packed_seq_params=packed(lengths))
    out.backward(upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = softmax_attention(*exact, lengths, softmax_scale or CHANNELS**-0.5)
    expected.backward(upstream.double())
    torch.testing.assert_close(out.detach().double(), expected.detach(), **FLOAT32)
    for tensor, reference in zip(inputs, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), reference.grad, **FLOAT32)


@pytest.mark.parametrize("v_channels", [5, CHANNELS, 12])
@pytest.mark.parametrize("sliding_window", [None, 1, 4])
@pytest.mark.parametrize("sinks", ["vanilla", "off-by-one", "learnable"])
def test_windows_sinks_and_channels_of_their_own(v_channels, sliding_window, sinks):
    """Mistral's window, GPT-OSS' sinks, and DeepSeek's values of other channels than the keys."""
    lengths = [3, 9, 1, 6]
    window = None if sliding_window is None else (sliding_window - 1, 0)
    attention = make_attention(v_channels=v_channels, window_size=window, softmax_type=sinks)
    query, key, _ = draw(sum(lengths), 2)
    value = torch.randn(sum(lengths), 2, v_channels, generator=torch.Generator().manual_seed(5))
    offsets = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks == "learnable" else torch.zeros(HEADS)
    if sinks == "learnable":
        attention.softmax_offset.data.copy_(offsets)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (*inputs, offsets)]
    upstream = torch.linspace(-1, 1, sum(lengths) * HEADS * v_channels).view(sum(lengths), -1)
    out = attention(*inputs, packed_seq_params=packed(lengths))
    out.backward(upstream)
    expected = softmax_attention(
        *exact[:3],
        lengths,
        CHANNELS**-0.5,
        sliding_window=sliding_window or 10**6,
        sinks=None if sinks == "vanilla" else exact[3],
    )
    expected.backward(upstream.double())
    torch.testing.assert_close(out.detach().double(), expected.detach(), **FLOAT32)
    for tensor, reference in zip(inputs, exact, strict=False):
        torch.testing.assert_close(tensor.grad.double(), reference.grad, **FLOAT32)
    if sinks == "learnable":
        torch.testing.assert_close(attention.softmax_offset.grad.double(), exact[3].grad, **FLOAT32)


def test_windows_of_some_layers():
    """window_attn_skip_freq=2: every second layer sees everything, the second among them."""
    micro_batch, params = draw(9, 2), packed([9])
    fields = {"window_size": (2, 0), "window_attn_skip_freq": 2}
    first, second = (make_attention(layer_number=number, **fields) for number in (1, 2))
    expected = make_attention()(*micro_batch, packed_seq_params=params)
    torch.testing.assert_close(second(*micro_batch, packed_seq_params=params), expected, **FLOAT32)
    windowed = first(*micro_batch, packed_seq_params=params)
    torch.testing.assert_close(windowed[:3], expected[:3], **FLOAT32)
    assert (windowed[3:] - expected[3:]).abs().amax(1).min() > 1e-3


def test_windows_of_padded_batches():
    attention = make_attention(window_size=(2, 0))
    micro_batch = draw(10, 2)
    batch = [torch.stack([tensor[:5], tensor[5:]], dim=1) for tensor in micro_batch]
    expected = attention(*micro_batch, packed_seq_params=packed([5, 5]))
    out = attention(*batch)
    torch.testing.assert_close(torch.cat([out[:, 0], out[:, 1]]), expected, **FLOAT32)


def test_dropout_needs_plain_attention():
    with pytest.raises(UserError, match=r"attention_dropout: given 0\.1, allowed: 0 with"):
        make_attention(window_size=(2, 0), attention_dropout=0.1)


def test_padded_batches_give_what_packed_micro_batches_give():
    """[L, B, heads, channels], as without packing; padding at the end is not seen by the tokens before it."""
    lengths = [5, 5]
    micro_batch = draw(10, 2)
    batch = [torch.stack([tensor[:5], tensor[5:]], dim=1) for tensor in micro_batch]
    attention = make_attention()
    expected = attention(*micro_batch, packed_seq_params=packed(lengths))
    out = attention(*batch)
    torch.testing.assert_close(torch.cat([out[:, 0], out[:, 1]]), expected, **FLOAT32)
    padded = [torch.cat([tensor, torch.full_like(tensor[:2], 1e3)]) for tensor in batch]
    torch.testing.assert_close(attention(*padded)[:5], out, **FLOAT32)


def test_a_nan_in_one_sequence_stays_there():
    micro_batch = draw(9, 2)
    for tensor in micro_batch:
        tensor[3:5] = torch.nan
    out = make_attention()(*micro_batch, packed_seq_params=packed([3, 2, 4]))
    assert out.isnan().any(1).tolist() == [False] * 3 + [True] * 2 + [False] * 4


def test_the_index_is_made_once_per_micro_batch():
    params = packed([2, 3])
    attention = make_attention()
    attention(*draw(5, 2), packed_seq_params=params)
    first = params.padded_batches
    attention(*draw(5, 2), packed_seq_params=params)
    assert params.padded_batches is first


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
def test_padding_is_under_a_half_and_every_token_has_a_place(lengths):
    """Lengths of 0 come from empty sequences, which have no token."""
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    batches = _PaddedBatches.of(cu_seqlens)
    places = torch.cat([tokens.flatten() for tokens in batches.gather])
    # Gathering and restoring is the identity on the micro-batch.
    assert places[batches.restore].tolist() == list(range(sum(lengths)))
    assert batches.restore.unique().numel() == sum(lengths)
    for tokens in batches.gather:
        # A batch's rows are sequences of its length or at least half of it.
        real = sum(len(set(row.tolist())) for row in tokens)
        assert 2 * real >= tokens.numel()
