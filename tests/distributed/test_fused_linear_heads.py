"""Both fused heads over 1, 2 and 4 gloo ranks, with and without sequence parallelism, against float64."""

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

NUM_TOKENS, WIDTH, CHUNK = 12, 48, 5
# Of 4 ranks with 12 rows each: all full; the last one short; the third short and the fourth all padding.
VOCAB_SIZES = (48, 41, 30)


def check(name: str, vocab_size: int, *, sequence_parallel: bool, num_tokens: int = NUM_TOKENS, **change: Any) -> Any:
    """This rank's shard of an example; returns what all ranks must share bit for bit."""
    dtype, temperature = change.get("dtype", torch.float32), change.get("temperature", 1.0)
    world = dist.group.WORLD
    assert world is not None
    ranks, rank = dist.get_world_size(), dist.get_rank()
    example = Example.draw(num_tokens, 16, WIDTH, vocab_size, dtype=dtype)
    expected = reference(example, temperature)
    columns = slice(rank * WIDTH // ranks, (rank + 1) * WIDTH // ranks)
    tokens = slice(rank * num_tokens // ranks, (rank + 1) * num_tokens // ranks) if sequence_parallel else slice(None)
    hidden = example.hidden[tokens].clone().requires_grad_()
    weight = example.weight[columns].clone().requires_grad_()
    main_grad = torch.ones_like(weight, dtype=torch.float32)
    with Watch() as watch:
        loss, log_probs, entropy = HEADS[name](
            hidden,
            weight,
            example.labels,
            token_losses,
            group=world,
            vocab_size=vocab_size,
            temperature=temperature,
            sequence_parallel=sequence_parallel,
            main_grad=main_grad,
            chunk_tokens=CHUNK,
            chunk_columns=7,
        )
        forward = list(watch.collectives)
        loss.backward()
    backward = watch.collectives[len(forward) :]

    # float32: sums of tens of products of numbers of about 1. bfloat16 gradients are rounded on each rank, and summed.
    rtol = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    atol = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(log_probs.detach().double(), expected["log_probs"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.detach().double(), expected["entropy"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss.detach().double(), expected["loss"], atol=2e-6, rtol=1e-6)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), expected["hidden"][tokens], atol=atol, rtol=rtol)
    torch.testing.assert_close(main_grad.double() - 1, expected["weight"][columns], atol=2e-6, rtol=2e-6)
    if num_tokens > 0 and ranks > 1:
        check_collectives(name, sequence_parallel, -(-num_tokens // CHUNK), forward, backward)
    if ranks == 1:
        assert forward == backward == []
    return torch.cat([loss.detach()[None], log_probs.detach(), entropy.detach()])


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
    for name in HEADS:
        for sequence_parallel in (False, True):
            for vocab_size in VOCAB_SIZES:
                shared.append(check(name, vocab_size, sequence_parallel=sequence_parallel, temperature=0.7))
            for change in ({"dtype": torch.bfloat16}, {"temperature": 0.3}, {"temperature": 3.0}):
                shared.append(check(name, 41, sequence_parallel=sequence_parallel, **change))
            shared.append(check(name, 41, sequence_parallel=sequence_parallel, num_tokens=0))
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
