"""The layouts of Megatron's parameters, by hand and for every shape."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.models.tensor_map import (
    RowRange,
    TensorMap,
    alternating_gate_up,
    gate_up,
    of_expert,
    padded_vocabulary_size,
    qkv,
    replicated,
    split,
    stacked,
    vocabulary,
)
from megatron_rl.weights.files.gather import place
from megatron_rl.weights.files.local_shards import matrix, rows, shard_parts


def test_replicated():
    norm = replicated("ours", "theirs", (6,))
    assert norm.replicated
    assert norm.row_ranges(0, 1) == norm.row_ranges(1, 2) == [RowRange("theirs", 0, 6)]
    assert norm.shard_shape(1, 2) == (6,)


def test_split_by_rows_and_by_columns():
    # Three ranks share six rows: the last has rows 4 and 5.
    rows = split("ours", "theirs", (6, 4), dim=0)
    assert rows.row_ranges(2, 3) == [RowRange("theirs", 4, 2)]
    assert rows.shard_shape(2, 3) == (2, 4)
    columns = split("ours", "theirs", (6, 4), dim=1)
    assert columns.row_ranges(1, 2) == [RowRange("theirs", 2, 2)]
    assert columns.shard_shape(1, 2) == (6, 2)


def test_gate_and_up_are_stacked_in_each_rank():
    # Not [gate; up] cut in two: rank 0 would then hold the whole gate and no up.
    mlp = gate_up("ours", "gate", "up", (6, 4))
    assert mlp.row_ranges(0, 2) == [RowRange("gate", 0, 3), RowRange("up", 0, 3)]
    assert mlp.row_ranges(1, 2) == [RowRange("gate", 3, 3), RowRange("up", 3, 3)]
    assert mlp.shard_shape(0, 2) == (6, 4)


def test_gate_and_up_that_take_turns():
    # Rows g0 u0 g1 u1 g2 u2 g3 u3 over two ranks: the second stacks [g2 g3] on [u2 u3].
    mlp = alternating_gate_up("ours", "theirs", (8, 4))
    assert mlp.row_ranges(1, 2) == [RowRange("theirs", 4, 2, step=2), RowRange("theirs", 5, 2, step=2)]
    assert mlp.shard_shape(1, 2) == (4, 4)
    whole = torch.arange(32).view(8, 4)
    assert [rows(whole, 0, row_range)[:, 0].tolist() for row_range in mlp.row_ranges(1, 2)] == [[16, 24], [20, 28]]


def test_experts_are_shared_out_in_order():
    experts = [of_expert(split(f"ours.{i}", f"theirs.{i}", (4, 6), dim=1), i, 8) for i in range(8)]
    assert [expert.expert_parallel_rank(4) for expert in experts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {expert.expert_parallel_rank(1) for expert in experts} == {0}
    assert experts[5].row_ranges(1, 2) == [RowRange("theirs.5", 3, 3)]
    assert split("ours", "theirs", (4, 6), dim=1).expert_parallel_rank(4) is None


def test_a_stack_of_transposed_experts():
    # Three experts of [rows 2, columns 4] in a tensor of [3, 4, 2]; the second of two ranks has columns 2 and 3.
    experts = [of_expert(split(f"ours.{i}", "theirs", (2, 4), dim=1), i, 3) for i in range(3)]
    stack = stacked(experts, transposed=True)
    assert [m.hf_shapes for m in stack] == [{"theirs": (3, 4, 2)}] * 3
    assert [m.index for m in stack] == [0, 1, 2]
    assert [m.expert for m in stack] == [0, 1, 2]
    assert stack[1].shard_shape(1, 2) == (2, 2)
    whole = torch.arange(24).view(3, 4, 2)
    shard = torch.zeros(2, 2, dtype=torch.int64)
    for piece in shard_parts(stack[1], 1, 2, shard):
        piece.shard.copy_(rows(matrix(stack[1], whole), 1, piece.row_range))
    assert shard.tolist() == [[12, 14], [13, 15]]  # whole[1] = [[8, 9], [10, 11], [12, 13], [14, 15]], transposed
    vectors = stacked([of_expert(replicated(f"ours.{i}", "theirs", (2,)), i, 3) for i in range(3)])
    assert vectors[2].hf_shapes == {"theirs": (3, 2)}
    assert vectors[2].shard_shape(0, 1) == (2,)
    assert matrix(vectors[2], torch.arange(6).view(3, 2)).tolist() == [4, 5]


def attention(num_heads: int, num_groups: int, head_dim: int, columns: tuple[int, ...] = (5,)) -> TensorMap:
    return qkv("ours", "q", "k", "v", num_heads=num_heads, num_groups=num_groups, head_dim=head_dim, columns=columns)


def test_qkv_is_interleaved_by_group():
    # Four query heads of 10 channels in two groups: rows are q0 q1 k0 v0 | q2 q3 k1 v1.
    whole = attention(4, 2, 10)
    assert whole.row_ranges(0, 1) == [
        RowRange("q", 0, 20),
        RowRange("k", 0, 10),
        RowRange("v", 0, 10),
        RowRange("q", 20, 20),
        RowRange("k", 10, 10),
        RowRange("v", 10, 10),
    ]
    assert whole.row_ranges(0, 2) == whole.row_ranges(0, 1)[:3]
    assert whole.row_ranges(1, 2) == whole.row_ranges(0, 1)[3:]
    assert whole.hf_shapes == {"q": (40, 5), "k": (20, 5), "v": (20, 5)}
    assert whole.shard_shape(0, 2) == (40, 5)


def test_qkv_with_fewer_groups_than_ranks_cuts_through_a_group():
    # One group of q0..q3 k0 v0, 10 rows each, over four ranks: 15 rows each.
    one_group = attention(4, 1, 10)
    assert [one_group.row_ranges(rank, 4) for rank in range(4)] == [
        [RowRange("q", 0, 15)],
        [RowRange("q", 15, 15)],
        [RowRange("q", 30, 10), RowRange("k", 0, 5)],
        [RowRange("k", 5, 5), RowRange("v", 0, 10)],
    ]


def test_qkv_with_more_groups_than_ranks():
    # Multi-head attention: each of three heads is a group of its own; no two ranks share one.
    assert attention(3, 3, 2).row_ranges(1, 3) == [RowRange("q", 2, 2), RowRange("k", 2, 2), RowRange("v", 2, 2)]


def test_the_bias_of_qkv_follows_its_rows():
    weight, bias = attention(4, 2, 10), attention(4, 2, 10, columns=())
    assert bias.hf_shapes == {"q": (40,), "k": (20,), "v": (20,)}
    for rank in range(4):
        assert bias.row_ranges(rank, 4) == weight.row_ranges(rank, 4)
    assert bias.shard_shape(3, 4) == (20,)


@pytest.mark.parametrize(("vocab_size", "tp_size", "padded"), [(259, 1, 259), (259, 2, 260), (259, 4, 260), (8, 4, 8)])
def test_padded_vocabulary_size(vocab_size, tp_size, padded):
    assert padded_vocabulary_size(vocab_size, tp_size) == padded


def test_the_vocabulary_is_padded_with_zeros_at_its_end():
    # Five rows over four ranks are padded to eight, two each: 01 23 4_ __.
    embedding = vocabulary("ours", "theirs", (5, 3))
    assert [embedding.row_ranges(rank, 4) for rank in range(4)] == [
        [RowRange("theirs", 0, 2)],
        [RowRange("theirs", 2, 2)],
        [RowRange("theirs", 4, 1), RowRange(None, 0, 1)],
        [RowRange(None, 0, 2)],
    ]
    assert [embedding.shard_shape(rank, 4) for rank in range(4)] == [(2, 3)] * 4


@st.composite
def maps_and_sizes(draw: st.DrawFn) -> tuple[TensorMap, int]:
    """A parameter of any kind and shape that Megatron takes, and a tensor-parallel size that divides it."""
    tp_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    size = st.integers(1, 4)
    kind = draw(st.sampled_from(["replicated", "split", "gate_up", "alternating", "qkv", "qkv_bias", "vocabulary"]))
    if kind == "replicated":
        return replicated("ours", "theirs", (draw(size),)), tp_size
    if kind == "split":
        dim = draw(st.integers(0, 1))
        shape = [draw(size), draw(size)]
        shape[dim] *= tp_size
        return split("ours", "theirs", tuple(shape), dim=dim), tp_size
    if kind == "gate_up":
        return gate_up("ours", "gate", "up", (draw(size) * tp_size, draw(size))), tp_size
    if kind == "alternating":
        return alternating_gate_up("ours", "theirs", (2 * draw(size) * tp_size, draw(size))), tp_size
    if kind == "vocabulary":
        return vocabulary("ours", "theirs", (draw(st.integers(1, 40)), draw(size))), tp_size
    # Query heads are shared evenly by the groups and by the ranks; groups are a multiple or a divisor of the ranks; and
    # where they are fewer, the ranks still share the rows of queries, keys and values evenly.
    groups = draw(st.sampled_from([g for g in range(1, 25) if g % tp_size == 0 or tp_size % g == 0]))
    heads = groups * draw(size) * (1 if groups % tp_size == 0 else tp_size // groups)
    head_dim = 2 * draw(size)
    assume((heads + 2 * groups) * head_dim % tp_size == 0)
    return attention(heads, groups, head_dim, () if kind == "qkv_bias" else (draw(size),)), tp_size


@settings(deadline=None)
@given(maps_and_sizes())
def test_cut_into_shards_and_assembled_again_every_element_is_in_its_place(case):
    """Every element of the Hugging Face tensors is in exactly one shard (in all, if replicated), and comes back."""
    tensor_map, tp_size = case
    whole, numel = {}, 0
    for name, shape in tensor_map.hf_shapes.items():
        whole[name] = numel + 1 + torch.arange(torch.Size(shape).numel()).view(shape)
        numel += whole[name].numel()

    shards = [shard_of(tensor_map, whole, rank, tp_size) for rank in range(tp_size)]
    for rank, shard in enumerate(shards):
        assert tuple(shard.shape) == tensor_map.shard_shape(rank, tp_size) == tuple(shards[0].shape)

    everything = shards[0] if tensor_map.replicated else torch.cat([shard.flatten() for shard in shards])
    real = everything[everything > 0]
    assert real.sort().values.tolist() == list(range(1, numel + 1))
    assembled: dict[str, Tensor] = {}
    place(tensor_map, shards, assembled)
    assert assembled.keys() == whole.keys()
    assert all(torch.equal(assembled[name], tensor) for name, tensor in whole.items())


def shard_of(tensor_map: TensorMap, whole: dict[str, Tensor], rank: int, tp_size: int) -> Tensor:
    """The definition: the concatenation of the row ranges; zeros where one has no tensor."""
    shape = list(next(iter(whole.values())).shape)
    pieces = []
    for row_range in tensor_map.row_ranges(rank, tp_size):
        shape[tensor_map.dim] = row_range.size
        zeros = torch.zeros(shape, dtype=torch.int64)
        assert row_range.size > 0
        index = torch.tensor([row_range.start + i * row_range.step for i in range(row_range.size)])
        pieces.append(
            zeros if row_range.hf_name is None else whole[row_range.hf_name].index_select(tensor_map.dim, index)
        )
    return torch.cat(pieces, tensor_map.dim)
