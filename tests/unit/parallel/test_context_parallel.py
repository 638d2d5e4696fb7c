"""Where the tokens of a micro-batch go under context parallelism: literal cases, and properties for any micro-batch."""

from itertools import accumulate, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.parallel.context_parallel import ContextSplit, gathered_order, rank_places


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def test_the_example_of_the_module() -> None:
    """a has 6 tokens, padded to 8; b has 3, padded to 4."""
    rank_0, rank_1 = (ContextSplit.of(bounds([6, 3]), size=2, rank=rank) for rank in range(2))
    assert rank_0.cu_seqlens.tolist() == [0, 8, 12]
    assert rank_0.max_seqlen == 8
    assert rank_0.tokens.tolist() == [0, 1, 5, 5, 6, 8]  # padding repeats the last token
    assert rank_0.is_padding.tolist() == [False, False, True, True, False, True]
    assert rank_0.position_ids.tolist() == [0, 1, 6, 7, 0, 3]
    assert rank_1.tokens.tolist() == [2, 3, 4, 5, 7, 8]
    assert not rank_1.is_padding.any()
    # a0 a1 from rank 0, a2 a3 a4 a5 from rank 1, whose part begins at 6, and so on.
    assert rank_0.restore.tolist() == [0, 1, 6, 7, 8, 9, 4, 10, 11]


def test_a_micro_batch_of_one_token_on_four_ranks() -> None:
    splits = [ContextSplit.of(bounds([1]), size=4, rank=rank) for rank in range(4)]
    assert [split.is_padding.tolist() for split in splits] == [[False, True], [True] * 2, [True] * 2, [True] * 2]
    assert [split.position_ids.tolist() for split in splits] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert splits[0].restore.tolist() == [0]


def test_sequence_parallelism_pads_the_micro_batch() -> None:
    """3 tokens over 2 ranks are 2 each; to be split by 3 more they are 6 each: 8 slots behind the sequence's 4."""
    split = ContextSplit.of(bounds([3]), size=2, rank=0, multiple=3)
    assert split.cu_seqlens.tolist() == [0, 4, 12]
    assert len(split.tokens) == 6


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 23), min_size=1, max_size=8).filter(any),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_every_token_is_somewhere_once(lengths: list[int], size: int, multiple: int) -> None:
    cu_seqlens = bounds(lengths)
    splits = [ContextSplit.of(cu_seqlens, size=size, rank=rank, multiple=multiple) for rank in range(size)]
    joined = torch.cat([split.tokens for split in splits])
    padding = torch.cat([split.is_padding for split in splits])
    assert joined[splits[0].restore].tolist() == list(range(sum(lengths)))
    assert not padding[splits[0].restore].any()
    assert int((~padding).sum()) == sum(lengths)
    assert len({len(split.tokens) for split in splits}) == 1
    assert len(splits[0].tokens) % multiple == 0
    whole = splits[0].cu_seqlens
    assert size == 1 or all((stop - start) % (2 * size) == 0 for start, stop in pairwise(whole.tolist()))
    # Padding is less than one unit for each sequence, and less than a common multiple behind the micro-batch.
    assert int(whole[-1]) < sum(lengths) + 2 * size * len(lengths) + 2 * size * multiple
    positions = torch.cat([split.position_ids for split in splits])[splits[0].restore]
    assert positions.tolist() == [i for length in lengths for i in range(length)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4))
def test_ranks_do_equal_work(chunks: list[int], size: int) -> None:
    """The keys that a rank's queries see, causally, are as many on all ranks: chunk r and chunk 2 size - 1 - r."""
    cu_seqlens = bounds([2 * size * chunk for chunk in chunks])
    position = torch.cat([torch.arange(2 * size * chunk) for chunk in chunks])
    seen = [int((position[rank_places(cu_seqlens, size, rank)] + 1).sum()) for rank in range(size)]
    assert len(set(seen)) == 1
    order = gathered_order(cu_seqlens, size)
    joined = torch.cat([rank_places(cu_seqlens, size, rank) for rank in range(size)])
    assert joined[order].tolist() == list(range(len(position)))
