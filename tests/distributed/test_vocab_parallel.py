"""Log-probs and entropy over 1, 2 and 4 gloo ranks, against float64 log_softmax of the whole vocabulary."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.parallel.vocab_parallel import vocab_parallel_log_probs
from tests.distributed.spawn import run_ranks

NUM_TOKENS = 9
WIDTH = 48  # divisible by 1, 2 and 4
# Of 4 ranks with 12 columns each: all full; the last one short; the third short and the fourth all padding.
VOCAB_SIZES = (48, 41, 30)
TEMPERATURES = (0.3, 1.0, 3.0)
FLOAT32 = {"atol": 1e-6, "rtol": 1e-6}  # float32 has eps 1.2e-7; a handful of operations on numbers up to about 10


class CountCollectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def example(vocab_size, scale, offset, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (scale * torch.randn(NUM_TOKENS, WIDTH, generator=generator) + offset).to(dtype)
    logits[:, vocab_size:] = float("nan")
    labels = torch.randint(0, vocab_size, (NUM_TOKENS,), generator=generator)
    labels[:2] = torch.tensor([0, vocab_size - 1])
    return logits, labels


def reference(logits, labels, vocab_size, temperature, upstream):
    logits = logits.double().requires_grad_()
    log_softmax = (logits[:, :vocab_size] / temperature).log_softmax(1)
    log_probs = log_softmax.gather(1, labels[:, None])[:, 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(1)
    (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()
    return log_probs.detach(), entropy.detach(), logits.grad


def check_shard(group, vocab_size, *, temperature=1.0, scale=3.0, offset=0.0, dtype=torch.float32):
    """This rank's shard of one example; its outputs, which all ranks must share bit for bit."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    logits, labels = example(vocab_size, scale, offset, dtype)
    upstream = torch.linspace(-2, 1, NUM_TOKENS), torch.linspace(1, -0.5, NUM_TOKENS)
    expected = reference(logits, labels, vocab_size, temperature, upstream)
    columns = slice(rank * WIDTH // ranks, (rank + 1) * WIDTH // ranks)
    shard = logits[:, columns].clone().requires_grad_()
    with CountCollectives() as forward:
        log_probs, entropy = vocab_parallel_log_probs(
            shard, labels, group=group, vocab_size=vocab_size, temperature=temperature, chunk_tokens=4
        )
    with CountCollectives() as backward:
        (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()

    assert len(forward.names) == (1 if ranks > 1 else 0), forward.names
    assert backward.names == []
    torch.testing.assert_close(log_probs.detach().double(), expected[0], **FLOAT32)
    torch.testing.assert_close(entropy.detach().double(), expected[1], **FLOAT32)
    assert shard.grad.dtype == dtype
    # A gradient in bfloat16 is rounded once: half an eps, relative.
    rtol = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 1e-6
    torch.testing.assert_close(shard.grad.double(), expected[2][:, columns], atol=1e-6, rtol=rtol)
    assert torch.equal(shard.detach().nan_to_num(), logits[:, columns].nan_to_num())
    return torch.cat([log_probs, entropy]).detach()


def check_finite_differences(group):
    """gradcheck in float64: each rank moves its own logits while the others' stand still, one rank after the other."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    logits = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels, step = torch.tensor([0, 4, 6]), 1e-6
    shard = logits[:, rank * 8 // ranks : (rank + 1) * 8 // ranks].clone().requires_grad_()

    def loss():
        log_probs, entropy = vocab_parallel_log_probs(shard, labels, group=group, vocab_size=7, temperature=0.7)
        return (log_probs * torch.tensor([1.0, -2.0, 0.5]) + entropy * torch.tensor([0.3, 1.0, -1.0])).sum()

    loss().backward()
    for column in range(8):
        owner, index = divmod(column, 8 // ranks)
        for row in range(3):
            values = []
            for sign in (1, -1):
                if rank == owner:
                    shard.data[row, index] += sign * step
                values.append(loss().item())
                if rank == owner:
                    shard.data[row, index] -= sign * step
            if rank == owner:
                # Central differences err by step^2 and by eps / step = 1e-10.
                assert abs((values[0] - values[1]) / (2 * step) - shard.grad[row, index].item()) < 1e-8


def check_all(rank):
    world = dist.group.WORLD
    shared = [
        check_shard(world, vocab_size, temperature=temperature, dtype=dtype)
        for vocab_size in VOCAB_SIZES
        for temperature in TEMPERATURES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    # Logits of +-1e4: log-probs of the same size, to which the relative tolerance applies. And logits far below 0,
    # which a rank without a token must not outbid.
    shared += [check_shard(world, vocab_size, scale=1e4) for vocab_size in VOCAB_SIZES]
    shared += [check_shard(world, vocab_size, offset=-1e4) for vocab_size in VOCAB_SIZES]
    check_finite_differences(world)
    nothing = torch.zeros(0, WIDTH, requires_grad=True)
    log_probs, entropy = vocab_parallel_log_probs(
        nothing, torch.zeros(0, dtype=torch.int64), group=world, vocab_size=WIDTH
    )
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,)
    with pytest.raises(ValueError, match="vocab_size is 1000"):
        vocab_parallel_log_probs(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), group=world, vocab_size=1000)
    if dist.get_world_size() == 4:
        shared.append(check_pairs(rank))
    return torch.stack(shared)


def check_pairs(rank):
    """Two tensor-parallel groups in one world: the rank that counts is the one inside the group."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return check_shard(pairs[rank // 2], 41)


@pytest.mark.parametrize("tensor_model_parallel_size", [1, 2, 4])
def test_against_the_whole_vocabulary(tensor_model_parallel_size):
    first, *others = run_ranks(check_all, tensor_model_parallel_size)
    assert all(torch.equal(other, first) for other in others)
