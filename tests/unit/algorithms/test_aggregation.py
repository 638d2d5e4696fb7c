"""The loss of a batch by definition, and from every split of it into micro-batches."""

import itertools

import pytest
import torch

from megatron_rl.algorithms.aggregation import GlobalCounts, aggregation_weights, count, weighted_sum

MODES = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "token_sum_norm"]
NORM = 10.0
NAN = float("nan")

# Masks of four sequences, of which the third has no token in the loss: 6 tokens in 3 sequences.
MASKS = [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
LOSSES = [[NAN, 1.0, 2.0, 3.0], [NAN, NAN, 10.0], [NAN, NAN], [5.0, 7.0]]
# token_mean: (1+2+3 + 10 + 5+7) / 6 = 28/6.   sequence_mean_token_mean: (2 + 10 + 6) / 3 = 6.
# sequence_mean_token_sum: 28 / 3.              token_sum_norm: 28 / (3 * 10).
EXPECTED = {
    "token_mean": 28 / 6,
    "sequence_mean_token_mean": 6.0,
    "sequence_mean_token_sum": 28 / 3,
    "token_sum_norm": 28 / 30,
}


def pack(sequences, padding=0):
    """Tokens of all sequences and cu_seqlens, then padding that belongs to none."""
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    tokens = [value for sequence in sequences for value in sequence] + [0.0] * padding
    return torch.tensor(tokens), lengths.cumsum(0).to(torch.int32)


def global_counts(micro_batches):
    counts = [count(*pack([MASKS[i] for i in micro_batch])) for micro_batch in micro_batches]
    return GlobalCounts(sum(tokens for tokens, _ in counts), sum(sequences for _, sequences in counts))


def weights_by_sequence(micro_batches, mode, padding=0):
    """The weights of each sequence, from the micro-batches of one split of the batch."""
    counts, by_sequence = global_counts(micro_batches), {}
    for micro_batch in micro_batches:
        loss_mask, cu_seqlens = pack([MASKS[i] for i in micro_batch], padding)
        weights = aggregation_weights(loss_mask, cu_seqlens, mode=mode, counts=counts, token_sum_norm=NORM)
        assert not weights[int(cu_seqlens[-1]) :].any()
        for i, first, end in zip(micro_batch, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
            by_sequence[i] = weights[first:end]
    return by_sequence


def splits(items):
    """Every partition of the items into micro-batches."""
    if not items:
        yield []
        return
    head, *tail = items
    for micro_batches in splits(tail):
        yield [[head], *micro_batches]
        for i in range(len(micro_batches)):
            yield [*micro_batches[:i], [head, *micro_batches[i]], *micro_batches[i + 1 :]]


def test_counts_by_hand():
    assert count(*pack(MASKS)) == (6.0, 3.0)
    assert count(*pack(MASKS, padding=5)) == (6.0, 3.0)
    assert count(*pack([[0.0, 0.0]])) == (0.0, 0.0)
    assert count(torch.zeros(0), torch.zeros(1, dtype=torch.int32)) == (0.0, 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_loss_by_definition(mode):
    loss_mask, cu_seqlens = pack(MASKS)
    weights = aggregation_weights(loss_mask, cu_seqlens, mode=mode, counts=GlobalCounts(6.0, 3.0), token_sum_norm=NORM)
    # Six products and sums in float32, 6e-8 each.
    assert float(weighted_sum(pack(LOSSES)[0], weights)) == pytest.approx(EXPECTED[mode], rel=5e-7)


@pytest.mark.parametrize("mode", MODES)
def test_no_split_order_or_padding_changes_a_weight_by_one_bit(mode):
    whole = weights_by_sequence([[0, 1, 2, 3]], mode)
    num_splits = 0
    for micro_batches in splits([0, 1, 2, 3]):
        for padding, reverse in itertools.product((0, 3), (False, True)):
            ordered = [micro_batch[::-1] for micro_batch in micro_batches[::-1]] if reverse else micro_batches
            got = weights_by_sequence(ordered, mode, padding)
            assert all(torch.equal(got[i], whole[i]) for i in range(4))
        num_splits += 1
    assert num_splits == 15  # the partitions of four sequences


def test_dividing_per_micro_batch_and_averaging_would_be_caught():
    """The bug that global counts exist to prevent: the same split by local counts gives another loss."""

    def loss(micro_batches, *, counts_of):
        total = 0.0
        for micro_batch in micro_batches:
            loss_mask, cu_seqlens = pack([MASKS[i] for i in micro_batch])
            weights = aggregation_weights(
                loss_mask,
                cu_seqlens,
                mode="token_mean",
                counts=counts_of(micro_batches, micro_batch),
                token_sum_norm=None,
            )
            total += float(weighted_sum(pack([LOSSES[i] for i in micro_batch])[0], weights))
        return total

    micro_batches = [[0, 1], [2, 3]]
    right = loss(micro_batches, counts_of=lambda micro_batches, micro_batch: global_counts(micro_batches))
    wrong = loss(micro_batches, counts_of=lambda micro_batches, micro_batch: global_counts([micro_batch])) / len(
        micro_batches
    )
    assert right == pytest.approx(28 / 6, rel=5e-7)
    assert wrong == pytest.approx((16 / 4 + 12 / 2) / 2, rel=5e-7)  # 5 instead of 4.67


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_tokens_in_the_loss_has_weights_0(mode):
    loss_mask, cu_seqlens = pack([[0.0, 0.0], [0.0]])
    weights = aggregation_weights(loss_mask, cu_seqlens, mode=mode, counts=GlobalCounts(0.0, 0.0), token_sum_norm=NORM)
    assert weights.tolist() == [0.0, 0.0, 0.0]


def test_mask_in_the_padding_counts_for_nothing():
    loss_mask, cu_seqlens = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0, 2], dtype=torch.int32)
    assert count(loss_mask, cu_seqlens) == (2.0, 1.0)
    weights = aggregation_weights(
        loss_mask, cu_seqlens, mode="token_mean", counts=GlobalCounts(2.0, 1.0), token_sum_norm=None
    )
    assert weights.tolist() == [0.5, 0.5, 0.0]


def test_gradient_of_the_weighted_sum_is_the_weights():
    losses = torch.tensor([3.0, NAN, float("inf"), -1.0], requires_grad=True)
    weights = torch.tensor([0.25, 0.0, 0.0, 0.5])
    loss = weighted_sum(losses, weights)
    loss.backward()
    assert float(loss.detach()) == 0.25
    assert torch.equal(losses.grad, weights)


def test_a_plain_product_would_be_nan():
    losses, weights = torch.tensor([3.0, NAN]), torch.tensor([0.25, 0.0])
    assert torch.isnan((losses * weights).sum())
    assert float(weighted_sum(losses, weights)) == 0.75


def test_a_nan_with_weight_is_seen():
    assert torch.isnan(weighted_sum(torch.tensor([3.0, NAN]), torch.tensor([0.25, 0.25])))


@pytest.mark.parametrize("norm", [None, 0.0, -1.0])
def test_token_sum_norm_needs_its_number(norm):
    with pytest.raises(ValueError, match="needs token_sum_norm > 0, got"):
        aggregation_weights(*pack(MASKS), mode="token_sum_norm", counts=GlobalCounts(6.0, 3.0), token_sum_norm=norm)


def test_unknown_mode_names_the_four():
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; one of 'token_mean', 'sequence_mean_token_mean'"):
        aggregation_weights(*pack(MASKS), mode="mean", counts=GlobalCounts(6.0, 3.0), token_sum_norm=None)
