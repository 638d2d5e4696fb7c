"""Attention over intervals against the softmax written out in float64, values and gradients."""

import pytest
import torch

from megatron_rl.parallel import interval_attention as module
from megatron_rl.parallel.interval_attention import interval_attention

# float64 on both sides: 2.2e-16 per rounding, over sums of up to 40 products of size 1, and their gradients.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}


def written_out(query, key, value, first, last, scale, sinks):
    """The definition, one query and head at a time."""
    rows = []
    for i in range(len(query)):
        heads = []
        for head in range(query.shape[1]):
            group = head * key.shape[1] // query.shape[1]
            keys = slice(int(first[i]), int(last[i]) + 1)
            logits = scale * key[keys, group] @ query[i, head]
            if sinks is not None:
                logits = torch.cat([logits, sinks[head, None]])
            probabilities = logits.softmax(0)[: keys.stop - keys.start]
            heads.append(probabilities @ value[keys, group])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def draw(num_queries=30, num_keys=40, groups=2, channels=6, value_channels=4):
    generator = torch.Generator().manual_seed(1)
    shapes = (num_queries, 4, channels), (num_keys, groups, channels), (num_keys, groups, value_channels), (4,)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    bounds = torch.randint(0, num_keys, (2, num_queries), generator=generator)
    return tensors, bounds.amin(0), bounds.amax(0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("small_blocks", [False, True])
def test_values_and_gradients(groups, with_sinks, small_blocks, monkeypatch):
    if small_blocks:  # blocks of 7 queries, of which the elements allow fewer only from 16 on
        monkeypatch.setattr(module, "_BLOCK_QUERIES", 7)
    tensors, first, last = draw(groups=groups)
    upstream = torch.linspace(-1, 1, 30 * 4 * 4, dtype=torch.float64).view(30, 4, 4)
    results = []
    for function in (interval_attention, None):
        query, key, value, sinks = (x.clone().requires_grad_() for x in tensors)
        given = sinks if with_sinks else None
        if function is None:
            out = written_out(query, key, value, first, last, 0.3, given)
        else:
            out = function(query, key, value, first, last, scale=0.3, sinks=given)
        out.backward(upstream)
        results.append([out.detach(), query.grad, key.grad, value.grad, sinks.grad])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, **FLOAT64)


def test_a_planted_bug_is_seen(monkeypatch):
    """With an interval that ends one key late, the comparison above fails."""
    tensors, first, last = draw()
    expected = written_out(*tensors[:3], first, last, 0.3, None)
    late = interval_attention(*tensors[:3], first, (last + 1).clamp(max=39), scale=0.3)
    assert (late - expected).abs().max() > 1e-3


def test_elements_bound_the_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 4 * 20 * 1000)
    first, last = torch.zeros(100, dtype=torch.int64), torch.arange(1000, 1100)
    blocks = list(module._blocks(first, last, 4))
    assert [queries.start for queries, _ in blocks[1:]] == [queries.stop for queries, _ in blocks[:-1]]
    # 19 queries x 1,019 keys x 4 heads = 77,444 scores; 20 x 1,020 x 4 would be 81,600.
    assert blocks[0] == (slice(0, 19), slice(0, 1019))


def test_bfloat16_is_computed_in_float32():
    tensors, first, last = draw()
    low = [x.bfloat16() for x in tensors[:3]]
    out = interval_attention(*low, first, last, scale=0.3)
    assert out.dtype is torch.bfloat16
    exact = interval_attention(*(x.double() for x in low), first, last, scale=0.3)
    # One rounding of the result, 2^-9 relative; the sums inside are float32.
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("first", "last"), [([1], [0]), ([-1], [0]), ([0], [40])])
def test_intervals_that_make_no_sense(first, last):
    tensors, _, _ = draw(num_queries=1)
    with pytest.raises(ValueError, match=r"empty intervals, or keys outside of \[0, 40\)"):
        interval_attention(*tensors[:3], torch.tensor(first), torch.tensor(last), scale=1.0)
