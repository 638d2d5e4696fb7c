"""Log-probs and entropy on one rank, against float64 log_softmax; the sharded case is in tests/distributed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.parallel.vocab_parallel import vocab_parallel_log_probs

FLOAT32 = {"atol": 1e-6, "rtol": 1e-6}  # float32 has eps 1.2e-7; a handful of operations on numbers up to about 10


def reference(logits, labels, vocab_size, temperature):
    log_softmax = (logits.double()[:, :vocab_size] / temperature).log_softmax(1)
    return log_softmax.gather(1, labels[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(1)


def example(num_tokens=7, width=64, vocab_size=51, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, width, generator=generator)
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return logits.to(dtype), labels


def local(logits, labels, **kwargs):
    return vocab_parallel_log_probs(logits, labels, group=None, **{"vocab_size": logits.shape[1], **kwargs})


def test_by_hand():
    # exp of the logits: 1, 2, 5. p = 1/8, 2/8, 5/8. At temperature 1/2 they are squared: 1, 4, 25 of 30.
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    log_probs, entropy = local(logits, torch.tensor([1]))
    assert float(log_probs) == pytest.approx(math.log(2 / 8), rel=1e-6)
    assert float(entropy) == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)), rel=1e-6)
    log_probs, _ = local(logits, torch.tensor([1]), temperature=0.5)
    assert float(log_probs) == pytest.approx(math.log(4 / 30), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_values_and_gradients_agree_with_float64(dtype, temperature):
    logits, labels = example(dtype=dtype)
    logits.requires_grad_()
    before = logits.detach().clone()
    log_probs, entropy = local(logits, labels, vocab_size=51, temperature=temperature)
    upstream = torch.linspace(-1, 2, len(labels))
    (log_probs * upstream + entropy * upstream.flip(0)).sum().backward()

    exact = before.double().requires_grad_()
    expected_log_probs, expected_entropy = reference(exact, labels, 51, temperature)
    (expected_log_probs * upstream + expected_entropy * upstream.flip(0)).sum().backward()

    assert log_probs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected_log_probs, **FLOAT32)
    torch.testing.assert_close(entropy.double(), expected_entropy, **FLOAT32)
    assert logits.grad.dtype == dtype
    # Gradients are rounded once to the input's dtype: half an eps, relative. float16 has subnormals below 6e-5.
    half_eps = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=half_eps + 1e-6)
    assert not logits.grad[:, 51:].any()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("outputs", ["log_probs", "entropy", "both"])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 100])
def test_gradient_agrees_with_finite_differences(outputs, chunk_tokens):
    logits, labels = example(num_tokens=5, width=8, vocab_size=6, dtype=torch.float64)
    logits.requires_grad_()

    def values(x):
        pair = local(x, labels, vocab_size=6, temperature=0.7, chunk_tokens=chunk_tokens)
        return {"log_probs": pair[0], "entropy": pair[1], "both": pair}[outputs]

    assert torch.autograd.gradcheck(values, (logits,))


def test_without_entropy_the_log_probs_and_their_gradient_are_the_same():
    logits, labels = example()
    results = []
    for entropy in (True, False):
        x = logits.clone().requires_grad_()
        log_probs, value = local(x, labels, vocab_size=51, entropy=entropy)
        assert (value is not None) == entropy
        log_probs.sum().backward()
        results.append((log_probs.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 1000])
def test_chunks_do_not_change_the_result(chunk_tokens):
    logits, labels = example()
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    chunked = local(x, labels, vocab_size=51, chunk_tokens=chunk_tokens)
    whole = local(y, labels, vocab_size=51, chunk_tokens=7)
    sum(part.sum() for part in chunked).backward()
    sum(part.sum() for part in whole).backward()
    # A row is reduced by itself; only the kernel's order of summation may depend on the number of rows.
    for got, expected in zip((*chunked, x.grad), (*whole, y.grad), strict=True):
        torch.testing.assert_close(got, expected, **FLOAT32)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_padding_columns_may_hold_anything(garbage):
    logits, labels = example()
    logits[:, 51:] = garbage
    logits.requires_grad_()
    log_probs, entropy = local(logits, labels, vocab_size=51)
    (log_probs + entropy).sum().backward()
    expected = local(logits.detach()[:, :51].contiguous(), labels)
    torch.testing.assert_close(log_probs, expected[0], **FLOAT32)
    torch.testing.assert_close(entropy, expected[1], **FLOAT32)
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, 51:].any()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_large_logits(temperature, offset):
    # Integers, which float32 holds exactly: what is left is the function's own error.
    logits = offset + torch.tensor([[0.0, 1.0, 2.0, -4.0], [0.0, -1e4, 1e4, 0.0]])
    labels = torch.tensor([3, 1])
    logits.requires_grad_()
    log_probs, entropy = local(logits, labels, temperature=temperature)
    (log_probs + entropy).sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, labels, 4, temperature)
    (expected[0] + expected[1]).sum().backward()
    torch.testing.assert_close(log_probs.double(), expected[0], **FLOAT32)
    # Where p underflows to 0 the reference multiplies it with a finite log p: 0, as it should be.
    torch.testing.assert_close(entropy.double(), expected[1], **FLOAT32)
    torch.testing.assert_close(logits.grad.double(), exact.grad, **FLOAT32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), st.floats(0.3, 3.0), st.integers(0, 8))
def test_bounds_hold_exactly(logits, temperature, label):
    label %= len(logits)
    log_probs, entropy = local(torch.tensor([logits]), torch.tensor([label]), temperature=temperature)
    assert -math.inf < float(log_probs) <= 0.0
    # The float32 that is nearest to log V may be above it by half an ulp.
    assert 0.0 <= float(entropy) <= float(torch.tensor(math.log(len(logits))))


@pytest.mark.parametrize("vocab_size", [3, 7, 50])
def test_entropy_of_nearly_uniform_distributions_is_bounded(vocab_size):
    # float32 sums of exponentials near 1 err by more than these distributions fall short of log V.
    logits = 1e-6 * torch.randn(1000, vocab_size, generator=torch.Generator().manual_seed(0))
    _, entropy = local(logits, torch.zeros(1000, dtype=torch.int64))
    assert float(entropy.max()) == float(torch.tensor(math.log(vocab_size)))


def test_uniform_and_certain_distributions():
    _, entropy = local(torch.full((1, 1000), -7.3), torch.tensor([0]))
    assert float(entropy) == pytest.approx(math.log(1000), rel=2e-7)  # one rounding to float32, and the clamp
    log_probs, entropy = local(torch.tensor([[0.0, 200.0]]), torch.tensor([1]))
    assert float(log_probs) == 0.0
    assert float(entropy) == 0.0


def test_a_label_outside_the_vocabulary_is_nan_and_harms_no_other_token():
    logits, labels = example()
    logits.requires_grad_()
    labels[2], labels[4] = -100, 51
    log_probs, entropy = local(logits, labels, vocab_size=51)
    assert torch.isnan(log_probs).tolist() == [False, False, True, False, True, False, False]
    assert torch.isfinite(entropy).all()
    torch.where(torch.isnan(log_probs), 0.0, log_probs).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[[2, 4]].any()


def test_no_tokens():
    logits = torch.zeros(0, 8, requires_grad=True)
    log_probs, entropy = local(logits, torch.zeros(0, dtype=torch.int64))
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,)
    assert logits.grad.shape == (0, 8)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not function.is_view and tensor is not args[0]:
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_forward_makes_no_tensor_larger_than_a_chunk_and_keeps_none():
    num_tokens, width, chunk_tokens = 64, 256, 4
    logits, labels = example(num_tokens, width, width, dtype=torch.bfloat16)
    logits.requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        local(logits, labels, chunk_tokens=chunk_tokens)
    assert largest.num_elements == chunk_tokens * width
    assert (
        sum(tensor.numel() for tensor in kept if tensor is not None and tensor.shape != logits.shape) <= 6 * num_tokens
    )
    assert all(tensor.data_ptr() == logits.data_ptr() for tensor in kept if tensor.shape == logits.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; 1 ranks of 64 columns"),
        ({"vocab_size": 65}, "vocab_size is 65; 1 ranks of 64 columns"),
        ({"temperature": 0.0}, r"temperature is 0\.0; must be positive"),
        ({"temperature": float("nan")}, "temperature is nan; must be positive"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; must be at least 1"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels \(3,\) \[T\]"),
    ],
)
def test_arguments_that_make_no_sense(change, message):
    logits, labels = example()
    with pytest.raises(ValueError, match=message):
        local(**{"logits": logits, "labels": labels, **change})
