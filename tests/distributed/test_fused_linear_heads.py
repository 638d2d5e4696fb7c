"""Both fused heads over 1, 2 and 4 gloo ranks, with and without sequence parallelism, against float64."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel.filtered_log_probs import filtered_log_probs
from megatron_rl.parallel.vocab_parallel_divergences import (
    vocab_parallel_argmax,
    vocab_parallel_divergence,
    vocab_parallel_log_probs_of,
)
from tests.distributed.spawn import run_ranks
from tests.unit.parallel.linear_heads import HEADS, Example, Watch, reference, token_losses
from tests.unit.parallel.logits_losses import DIRECTIONS, LOGITS_LOSSES, logits_reference, run_logits_loss

NUM_TOKENS, WIDTH, CHUNK = 12, 48, 5
# Of 4 ranks with 12 rows each: all full; the last one short; the third short and the fourth all padding.
VOCAB_SIZES = (48, 41, 30)
COLLECTIVES = dict.fromkeys(DIRECTIONS, 3) | {"label_smoothing": 1, "top_k_distillation": 2, "filtered": 11}
"""Of a loss of whole distributions, per chunk. The filter's two thresholds take four each."""


def check(name: str, example: Example, *, sequence_parallel: bool, temperature: float = 1.0) -> Any:
    """This rank's shard of an example; returns what all ranks must share bit for bit."""
    ranks, expected = dist.get_world_size(), reference(example, temperature)
    tokens, columns = shard(example, sequence_parallel)
    hidden = example.hidden[tokens].clone().requires_grad_()
    weight = example.weight[columns].clone().requires_grad_()
    # As a further micro-batch finds it: float32, of the size of the gradient.
    before = expected["weight"][columns].float()
    main_grad = before.clone()
    with Watch() as watch:
        loss, log_probs, entropy = HEADS[name](
            hidden,
            weight,
            example.labels,
            token_losses,
            group=dist.group.WORLD,
            vocab_size=example.vocab_size,
            temperature=temperature,
            sequence_parallel=sequence_parallel,
            main_grad=main_grad,
            chunk_tokens=CHUNK,
            chunk_columns=7 if len(example.weight) < 1000 else 500,
        )
        forward = list(watch.collectives)
        loss.backward()
    backward = watch.collectives[len(forward) :]

    for key, value in (("log_probs", log_probs), ("entropy", entropy), ("loss", loss)):
        torch.testing.assert_close(value.detach().double(), expected[key], atol=1e-6, rtol=1e-6, equal_nan=True)
    assert not (log_probs > 0).any()
    assert (entropy >= 0).all()
    assert (entropy <= torch.tensor(math.log(example.vocab_size))).all()
    assert hidden.grad is not None
    agree(hidden.grad, expected["hidden"], tokens, hidden_rounding(example, expected["logits"], ranks))
    agree(main_grad, expected["weight"] + expected["weight"].float(), columns)
    # A chunk's logits, the gathered statistics, what is given, or `token_losses`' 1,000 places: never all logits.
    sizes = weight.numel(), expected["hidden"].numel(), CHUNK * len(weight), 4 * ranks * len(example.labels), 1000
    assert watch.largest <= max(sizes)
    if len(example.labels) > 0 and ranks > 1:
        check_collectives(name, sequence_parallel, -(-len(example.labels) // CHUNK), forward, backward)
    if ranks == 1:
        assert forward == backward == []
    return torch.cat([loss.detach()[None], log_probs.detach(), entropy.detach()]).nan_to_num()


def check_logits_loss(name: str, example: Example, *, sequence_parallel: bool) -> Any:
    """As `check`, of a loss of whole distributions."""
    tokens, columns = shard(example, sequence_parallel)
    place: Any = dict(group=dist.group.WORLD, sequence_parallel=sequence_parallel, chunk_tokens=CHUNK, temperature=0.7)
    with Watch() as watch:
        found = run_logits_loss(name, example, tokens=tokens, columns=columns, **place)
    if dist.get_world_size() > 1:
        gathers = ["_allgather_base"] * 2 if sequence_parallel else []  # the teacher's hidden states, and the student's
        reduction = "_reduce_scatter_base" if sequence_parallel else "allreduce"
        num_chunks = -(-len(example.labels) // CHUNK)
        assert watch.collectives == [*gathers, *["allgather"] * num_chunks * COLLECTIVES[name], reduction]
    expected = logits_reference(name, example, 0.7)
    for key in ("loss", "value"):
        torch.testing.assert_close(found[key].double(), expected[key].double(), atol=1e-6, rtol=1e-6)
    agree(found["hidden"], expected["hidden"], tokens)
    agree(found["weight"], expected["weight"], columns)
    return torch.cat([found["loss"][None], found["value"].float()])


def shard(example: Example, sequence_parallel: bool) -> tuple[slice, slice]:
    """This rank's tokens and columns."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parts = [slice(rank * n // ranks, (rank + 1) * n // ranks) for n in (len(example.labels), len(example.weight))]
    return parts[0] if sequence_parallel else slice(None), parts[1]


def agree(found: torch.Tensor, expected: torch.Tensor, part: slice, rounding: torch.Tensor | None = None) -> None:
    """`found` is that part of a gradient, but for 1e-6 of the gradient's largest element, and `rounding` [T, H]. An
    element is a sum of terms of both signs, each rounded to float32: its error goes by the terms' size, not its own."""
    if expected.numel() > 0:
        limit = 1e-6 * expected.abs().max()
        limit = limit if rounding is None else limit + rounding[part]
        assert ((found.double() - expected[part]).abs() <= limit).all()


def hidden_rounding(example: Example, grad_logits: torch.Tensor, ranks: int) -> torch.Tensor | None:
    """[T, H]: what rounding to bfloat16 may add to the hidden states' gradient. Each rank's part is rounded once, and
    so is each of the ranks - 1 partial sums, which is at most the sum of the parts' sizes: half an eps, relative."""
    if example.hidden.dtype == torch.float32:
        return None
    width = len(example.weight) // ranks
    weights = example.weight[: example.vocab_size].double().split(width)
    parts = [(g @ w).abs() for g, w in zip(grad_logits.split(width, 1), weights, strict=True)]
    return torch.stack(parts).sum(0) * ranks * torch.finfo(torch.bfloat16).eps / 2 * (1 + 2.0**-7)


def check_collectives(
    name: str, sequence_parallel: bool, num_chunks: int, forward: list[str], backward: list[str]
) -> None:
    """The two passes gather statistics once; the single pass per chunk, and has nothing to do in the backward pass."""
    gather = ["_allgather_base"] if sequence_parallel else []
    reduce = ["_reduce_scatter_base" if sequence_parallel else "allreduce"]
    if name == "two_pass":
        assert forward == [*gather, "allgather"]
        assert backward == [*gather, *reduce]
    else:
        assert forward == [*gather, *["allgather"] * num_chunks, *reduce]
        assert backward == []


def check_all(rank: int) -> list[Any]:
    shared = []
    example = Example.draw(NUM_TOKENS, 16, WIDTH, 41)
    smaller = Example.draw(NUM_TOKENS, 16, WIDTH, 30)
    # 3 tokens are left for the second chunk. float32 logits of H = 256 are off by about 1e-6 where their standard
    # deviation is 1, and so is what is made of them; with larger ones the output layer's own rounding is larger.
    wide = Example.draw(8, 256, 4008, 4001, scale=1.0)
    long = Example.draw(64, 8, 512, 500)
    for sequence_parallel in (False, True):
        for name in HEADS:
            head = partial(check, name, sequence_parallel=sequence_parallel)
            shared += [head(Example.draw(NUM_TOKENS, 16, WIDTH, v), temperature=0.7) for v in VOCAB_SIZES]
            shared += [head(example, temperature=temperature) for temperature in (0.3, 3.0)]
            shared += [head(Example.draw(NUM_TOKENS, 16, WIDTH, 41, dtype=torch.bfloat16))]
            shared += [head(smaller.extreme(magnitude)) for magnitude in (1e4, -1e4)]
            shared += [head(smaller.masked()), head(Example.draw(0, 16, WIDTH, 41)), head(wide), head(long)]
        for name in LOGITS_LOSSES:
            shared += [check_logits_loss(name, smaller, sequence_parallel=sequence_parallel)]
    return shared


@pytest.mark.parametrize("tensor_model_parallel_size", [1, 2, 4])
def test_against_the_whole_vocabulary(tensor_model_parallel_size: int) -> None:
    first, *others = run_ranks(check_all, tensor_model_parallel_size)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def check_other_functions(rank: int) -> Any:
    """Divergences, several log-probs, argmax and filtered log-probs: each rank's shard against the whole vocabulary."""
    world, ranks = dist.group.WORLD, dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(7, WIDTH, generator=generator) for _ in range(2))
    labels = torch.randint(0, 30, (7,), generator=generator)
    columns = slice(rank * WIDTH // ranks, (rank + 1) * WIDTH // ranks)
    shared = []

    def compare(function: Any) -> None:
        """`function` of the whole logits on one rank, and of the shards: values, and this rank's gradient."""
        whole, shard = student.clone().requires_grad_(), student[:, columns].clone().requires_grad_()
        expected, found = function(whole, teacher, None), function(shard, teacher[:, columns], world)
        upstream = torch.linspace(-1, 2, expected.numel()).view(expected.shape)
        (expected * upstream).sum().backward()
        (found * upstream).sum().backward()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert whole.grad is not None
        torch.testing.assert_close(shard.grad, whole.grad[:, columns], atol=1e-6, rtol=1e-6)
        shared.append(found.detach().flatten())

    for vocab_size in VOCAB_SIZES:
        place: Any = dict(vocab_size=vocab_size)
        for direction in ("forward", "reverse", "jensen_shannon"):
            compare(lambda x, y, g, d=direction, p=place: vocab_parallel_divergence(x, y, group=g, direction=d, **p))
        ids = labels[:, None] + torch.tensor([[0, -1, 0]]) * (labels[:, None] > 0)
        compare(lambda x, y, g, p=place, i=ids: vocab_parallel_log_probs_of(x, i, group=g, **p)[0])
        compare(lambda x, y, g, p=place, i=ids: vocab_parallel_log_probs_of(x, i, group=g, **p)[1])
        for top_k, top_p in ((5, 1.0), (None, 0.8), (9, 0.7)):
            f: Any = dict(top_k=top_k, top_p=top_p, chunk_tokens=4)
            compare(lambda x, y, g, f=f, p=place: filtered_log_probs(x, labels, group=g, **f, **p))
        found = vocab_parallel_argmax(student[:, columns], group=world, vocab_size=vocab_size)
        assert found.tolist() == student[:, :vocab_size].argmax(1).tolist()
    return torch.cat(shared)


def test_other_functions_of_sharded_logits() -> None:
    """4 ranks; with 30 tokens the last rank has none."""
    first, *others = run_ranks(check_other_functions, 4)
    assert all(torch.equal(first, other) for other in others)
