"""Packing: which data-parallel rank and micro-batch each sequence goes to, and the tensors of a micro-batch.

A micro-batch is the unit of one forward and backward pass: sequences one after another, [T] tokens without padding
between them, told apart by `cu_seqlens`. A plan says which sequences form which micro-batch on which rank:

    ranks          parts of equal cost, so that all ranks work equally long
    micro-batches  as few on every rank as the fullest rank needs, then parts of equal cost again: a few even ones take
                   less memory than full ones with a short last one. Where an even split would exceed
                   micro_batch_tokens, first-fit decreasing takes its place.

Every rank gets the same number of micro-batches, because each may hold a collective that all ranks must join. A plan is
a function of the lengths alone: every rank computes the same one, without communication.

Parts of equal cost come from the differencing method (Karmarkar and Karp 1982, "The differencing method of set
partitioning"), which is close where a part has many sequences. With a handful each it is off by several per cent of a
part, and every rank waits for the costliest: so the costliest part then moves a sequence to another part, or exchanges
one with it, as long as that makes the costlier of the two cheaper.
"""

import heapq
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rl.data.samples import TrainingSequence

NEW_VALUES, MEAN_LOG_PROBS, DIVERGENCE = "new_values", "mean_log_probs", "divergence"
"""In `MicroBatch.per_token` while a loss is computed: what the pass gives besides log-probs; see
`engine.head.Extra`."""

Plan = list[list[list[int]]]
"""[rank][micro_batch] -> indices of sequences, ascending."""


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward and backward pass; T tokens in S sequences, the padding counted as one of them."""

    tokens: Tensor
    """[T] int64."""
    labels: Tensor
    """[T] int64, the token that each position predicts."""
    loss_mask: Tensor
    """[T] float32, 0 on padding."""
    position_ids: Tensor
    """[T] int64, from 0 in every sequence."""
    cu_seqlens: Tensor
    """[S + 1] int32, where each sequence begins, and T."""
    max_seqlen: int
    """Length of the longest of the S sequences."""
    per_token: dict[str, Tensor]
    """[T] float32 each, 0 on padding."""
    sequence_ids: tuple[int, ...]
    """Which input sequences the micro-batch holds, in order; without the padding."""

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The micro-batch with its tensors on a device."""
        tensors: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, per_token={name: value.to(device) for name, value in self.per_token.items()})


def pack(sequences: Sequence[TrainingSequence], indices: Sequence[int], *, pad_to_multiple: int) -> MicroBatch:
    """The micro-batch of the sequences at `indices`.

    The micro-batch is filled up to a multiple of `pad_to_multiple` by a last sequence of token 0 with loss mask 0,
    which attends to itself alone. No indices at all give a micro-batch of pad_to_multiple such tokens: a rank without
    work still takes part in the collectives. `per_token` has the keys of sequences[0], which all sequences must share.
    """
    chosen = [sequences[i] for i in indices]
    keys = sequences[0].per_token.keys() if sequences else ()
    for i, sequence in zip(indices, chosen, strict=True):
        if sequence.num_positions < 1 or len(sequence.loss_mask) != sequence.num_positions:
            raise ValueError(
                f"sequence {i}: {sequence.num_positions} positions, {len(sequence.loss_mask)} in loss_mask"
            )
        if sequence.per_token.keys() != keys:
            raise ValueError(f"sequence {i} has per_token {sorted(sequence.per_token)}, the first has {sorted(keys)}")
    lengths = [sequence.num_positions for sequence in chosen]
    padding = -sum(lengths) % pad_to_multiple if lengths else pad_to_multiple
    spans = [*lengths, padding] if padding else lengths

    def joined(parts: Sequence[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate([*parts, np.zeros(padding)]).astype(dtype))

    return MicroBatch(
        tokens=joined([sequence.token_ids[:-1] for sequence in chosen], np.int64),
        labels=joined([sequence.token_ids[1:] for sequence in chosen], np.int64),
        loss_mask=joined([sequence.loss_mask for sequence in chosen], np.float32),
        position_ids=torch.cat([torch.arange(span) for span in spans]),
        cu_seqlens=torch.tensor([0, *np.cumsum(spans)], dtype=torch.int32),
        max_seqlen=max(spans),
        per_token={key: joined([sequence.per_token[key] for sequence in chosen], np.float32) for key in keys},
        sequence_ids=tuple(indices),
    )


def unpack(values: Tensor, micro_batch: MicroBatch) -> list[Tensor]:
    """values [T, ...] of a micro-batch, cut into one [L, ...] view per sequence of `micro_batch.sequence_ids`; padding
    is left out."""
    if len(values) != len(micro_batch.tokens):
        raise ValueError(f"{len(values)} values for a micro-batch of {len(micro_batch.tokens)} tokens")
    spans = pairwise(micro_batch.cu_seqlens.tolist())
    return [values[start:stop] for _, (start, stop) in zip(micro_batch.sequence_ids, spans, strict=False)]


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    micro_batch_tokens: int,
    cost: Callable[[int], float] | None = None,
    num_micro_batches_multiple: int = 1,
) -> Plan:
    """Distributes sequences over ranks and micro-batches; every sequence once, the same number of micro-batches (>= 1)
    on every rank.

    Args:
        lengths: positions of each sequence, >= 1; any number of them, also fewer than ranks.
        num_ranks: data-parallel ranks.
        micro_batch_tokens: most tokens of a micro-batch that holds more than one sequence; a longer sequence is a
            micro-batch alone.
        cost: work of a sequence of so many tokens, in any unit; what ranks and micro-batches are balanced by. A model
            with attention costs a * L + b * L^2. Default: the tokens.
        num_micro_batches_multiple: the number of micro-batches is one of its multiples, as interleaved pipeline stages
            ask for.

    Returns:
        [rank][micro_batch] -> indices. Micro-batches go from the most to the least costly, so that ranks that run in
        step run micro-batches alike, and a micro-batch too large for the memory fails first.
    """
    if num_ranks < 1 or micro_batch_tokens < 1 or min(lengths, default=1) < 1:
        raise ValueError(
            f"num_ranks {num_ranks}, micro_batch_tokens {micro_batch_tokens} and every length must be at least 1"
        )
    costs = [float(length) if cost is None else float(cost(length)) for length in lengths]
    ranks = balanced_parts(range(len(lengths)), costs, num_ranks)
    fitted = [_first_fit_decreasing(rank, lengths, micro_batch_tokens) for rank in ranks]
    num_micro_batches = max(1, *(len(micro_batches) for micro_batches in fitted))
    num_micro_batches += -num_micro_batches % num_micro_batches_multiple
    plan = []
    for rank, fallback in zip(ranks, fitted, strict=True):
        micro_batches = balanced_parts(rank, costs, num_micro_batches)
        if any(
            len(micro_batch) > 1 and sum(lengths[i] for i in micro_batch) > micro_batch_tokens
            for micro_batch in micro_batches
        ):
            micro_batches = _split(fallback, costs, num_micro_batches)
        micro_batches = [sorted(micro_batch) for micro_batch in micro_batches]
        plan.append(sorted(micro_batches, key=lambda micro_batch: (-sum(costs[i] for i in micro_batch), micro_batch)))
    return plan


def packing_efficiency(plan: Plan, lengths: Sequence[int], *, pad_to_multiple: int = 1) -> float:
    """Real tokens / (micro-batches * tokens of the largest micro-batch, padded): 1 when all micro-batches of all ranks
    are equally full.

    It is the useful part of the time if every micro-batch took as long as the largest, as in a pipeline or in lockstep.
    """
    micro_batches = [sum(lengths[i] for i in micro_batch) for rank in plan for micro_batch in rank]
    largest = -(-max(micro_batches) // pad_to_multiple) * pad_to_multiple
    return sum(micro_batches) / (len(micro_batches) * largest) if largest else 1.0


def imbalance(plan: Plan, lengths: Sequence[int]) -> float:
    """Tokens of the fullest rank / mean over the ranks - 1: 0 when all ranks have as many."""
    ranks = [sum(lengths[i] for micro_batch in rank for i in micro_batch) for rank in plan]
    return max(ranks) * len(ranks) / sum(ranks) - 1.0 if sum(ranks) else 0.0


def _first_fit_decreasing(items: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Micro-batches of at most `capacity` tokens, or of one longer sequence."""
    micro_batches: list[list[int]] = []
    free = np.zeros(len(items), dtype=np.int64)
    for i in sorted(items, key=lambda i: (-lengths[i], i)):
        fits = free[: len(micro_batches)] >= lengths[i]
        micro_batch = int(fits.argmax()) if fits.any() else len(micro_batches)
        if micro_batch == len(micro_batches):
            micro_batches.append([])
            free[micro_batch] = capacity
        micro_batches[micro_batch].append(i)
        free[micro_batch] -= lengths[i]
    return micro_batches


def _split(micro_batches: list[list[int]], costs: Sequence[float], num_micro_batches: int) -> list[list[int]]:
    """Halves the costliest micro-batch of several sequences until there are num_micro_batches; empty micro-batches only
    when none can be."""
    micro_batches = list(micro_batches)
    while len(micro_batches) < num_micro_batches:
        micro_batch = max(
            micro_batches,
            key=lambda micro_batch: (len(micro_batch) > 1, sum(costs[i] for i in micro_batch)),
            default=[],
        )
        if len(micro_batch) > 1:
            micro_batches.remove(micro_batch)
        micro_batches.extend(balanced_parts(micro_batch, costs, 2) if len(micro_batch) > 1 else [[]])
    return micro_batches


_GOOD_ENOUGH = 1e-3
"""Excess of the costliest part over the mean that is not worth an exchange."""
_MOST_EXCHANGES = 4
"""Per part."""


def balanced_parts(items: Sequence[int], costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Parts of almost equal total cost; min(num_parts, len(items)) of them are not empty. Deterministic.

    Args:
        items: indices into costs.
        costs: of all there are, > 0, in any unit.
        num_parts: at least 1.
    """
    if len(items) <= num_parts:
        return [[i] for i in items] + [[] for _ in range(num_parts - len(items))]
    return _exchange(_largest_differencing(items, costs, num_parts), costs)


def _largest_differencing(items: Sequence[int], costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """A solution is a list of at most num_parts (total, items), ascending, the missing ones being empty. The two
    solutions of the largest spread are merged, the largest part of one with the smallest of the other, until one is
    left.
    """
    tie = count()
    heap = [(-costs[i], next(tie), [(costs[i], [i])]) for i in items]  # alone, or beside empty parts: spread is cost
    heapq.heapify(heap)
    while len(heap) > 1:
        _, _, one = heapq.heappop(heap)
        _, _, other = heap[0]
        # Both are ascending. Only as many parts meet as do not fit beside each other; the rest meet empty parts.
        meeting = max(0, len(one) + len(other) - num_parts)
        met = [(a + b, x + y) for (a, x), (b, y) in zip(one[:meeting], other[:meeting][::-1], strict=True)]
        merged = one[meeting:] if len(one) >= len(other) else other[meeting:]
        rest = met + (other[meeting:] if len(one) >= len(other) else one[meeting:])
        if len(rest) == 1:
            insort(merged, rest[0])  # by far the most frequent case, and not one for sorting all parts anew
        else:
            merged = sorted(merged + rest)
        smallest = merged[0][0] if len(merged) == num_parts else 0.0
        heapq.heapreplace(heap, (smallest - merged[-1][0], next(tie), merged))
    return [part for _, part in heap[0][2]]


def _exchange(parts: list[list[int]], costs: Sequence[float]) -> list[list[int]]:
    """The parts after exchanges of the costliest with another: of one item for one, or for none."""
    items = [i for part in parts for i in part]
    # After the items one "none" per part, of cost 0.
    cost = np.array([costs[i] for i in items] + [0.0] * len(parts))
    owner = np.array([p for p, part in enumerate(parts) for _ in part] + list(range(len(parts))))
    total = np.bincount(owner, weights=cost, minlength=len(parts))
    for _ in range(_MOST_EXCHANGES * len(parts)):
        costliest = int(total.argmax())
        if total[costliest] <= (1 + _GOOD_ENOUGH) * total.mean():
            break
        own, others = np.flatnonzero((owner == costliest) & (cost > 0)), np.flatnonzero(owner != costliest)
        moved = cost[own, None] - cost[others]
        higher = np.maximum(total[costliest] - moved, total[owner[others]] + moved)
        give, take = np.unravel_index(higher.argmin(), higher.shape)
        if not higher[give, take] < total[costliest]:
            break
        other, amount = owner[others[take]], moved[give, take]
        total[costliest] -= amount
        total[other] += amount
        owner[own[give]] = other
        if others[take] < len(items):
            owner[others[take]] = costliest
    return [[items[k] for k in np.flatnonzero(owner[: len(items)] == p)] for p in range(len(parts))]
