"""Both fused heads on one rank, against float64; the sharded case is in tests/distributed."""

import math
from typing import Any

import pytest
import torch

from megatron_rl.parallel import vocab_statistics
from megatron_rl.parallel.fused_linear_log_probs import fused_linear_log_probs
from megatron_rl.parallel.fused_linear_token_loss import fused_linear_token_loss
from tests.unit.parallel.linear_heads import HEADS, Example, Watch, reference, run

FLOAT32 = {"atol": 1e-6, "rtol": 1e-6}  # float32 has eps 1.2e-7; sums of tens of products of numbers of about 1
TILES = [{}, {"chunk_tokens": 1, "chunk_columns": 100}, {"chunk_tokens": 4, "chunk_columns": 7}]

both_heads = pytest.mark.parametrize("name", HEADS)


def agree(found: dict[str, Any], expected: dict[str, Any], *, gradient_rtol: float = 1e-6) -> None:
    for key, value in found.items():
        # A gradient's elements are sums of both signs, whose rounding goes by the largest of them; float16 has half a
        # step of 2^-24 besides, however small they are.
        atol = 1e-6 * float(expected[key].abs().max()) + (2.0**-25 if value.dtype == torch.float16 else 0.0)
        tolerance = {"atol": atol, "rtol": gradient_rtol} if key in ("hidden", "weight") else FLOAT32
        torch.testing.assert_close(
            value.double(), expected[key].double(), **tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_by_hand() -> None:
    # Logits log 1, log 2, log 5 of a weight that copies the hidden state: p = 1/8, 2/8, 5/8.
    hidden = torch.tensor([[1.0, 2.0, 5.0]]).log().requires_grad_()
    weight = torch.eye(3).requires_grad_()
    log_probs, entropy = fused_linear_log_probs(hidden, weight, torch.tensor([1]), group=None, vocab_size=3)
    assert float(log_probs) == pytest.approx(math.log(2 / 8), rel=1e-6)
    assert float(entropy) == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)), rel=1e-6)
    log_probs.sum().backward()
    # d log p_label / d logits = 1[j = label] - p_j, here also the gradient of the hidden state.
    assert hidden.grad.tolist()[0] == pytest.approx([-1 / 8, 6 / 8, -5 / 8], rel=1e-6)
    loss, *_ = fused_linear_token_loss(
        hidden.detach(), weight, torch.tensor([1]), lambda lp, e, t: -3 * lp, group=None, vocab_size=3
    )
    assert float(loss) == pytest.approx(-3 * math.log(2 / 8), rel=1e-6)


@both_heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("tiles", TILES)
def test_values_and_gradients_agree_with_float64(name: str, dtype: Any, temperature: float, tiles: Any) -> None:
    example = Example.draw(dtype=dtype)
    found = run(HEADS[name], example, temperature=temperature, **tiles)
    assert found["log_probs"].dtype == found["entropy"].dtype == torch.float32
    assert found["hidden"].dtype == found["weight"].dtype == dtype
    # Gradients are rounded once to the inputs' dtype: half an eps, relative. float16 has subnormals below 6e-5.
    agree(found, reference(example, temperature), gradient_rtol=torch.finfo(dtype).eps / 2 + 1e-6)
    assert not found["weight"][example.vocab_size :].any()


@both_heads
def test_main_grad_is_added_to_in_float32_and_autograd_gets_none(name: str) -> None:
    example = Example.draw(dtype=torch.bfloat16)
    expected = reference(example)
    main_grad = torch.full(example.weight.shape, 10.0)
    found = run(HEADS[name], example, main_grad=main_grad)
    assert "weight" not in found
    # Rounded to bfloat16 anywhere on the way it would be off by 4e-3; eps of float32 at 10 is 1e-6.
    torch.testing.assert_close(main_grad.double() - 10, expected["weight"], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("tiles", TILES)
def test_gradient_agrees_with_finite_differences(tiles: Any) -> None:
    example = Example.draw(5, 3, 8, 6, dtype=torch.float64)
    arguments: Any = dict(group=None, vocab_size=6, temperature=0.7, **tiles)

    def values(hidden: Any, weight: Any) -> Any:
        return fused_linear_log_probs(hidden, weight, example.labels, **arguments)

    inputs = example.hidden.clone().requires_grad_(), example.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(values, inputs)
    # The single pass can be run backward once per forward pass only; its gradient is the same.
    one, two = (run(HEADS[name], example, temperature=0.7, **tiles) for name in ("single_pass", "two_pass"))
    for key in two:
        torch.testing.assert_close(one[key], two[key], atol=1e-12, rtol=1e-12)


@both_heads
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_large_logits(name: str, magnitude: float) -> None:
    # Integers that float32 holds exactly, and a weight that picks them: what is left is the head's own error. The
    # largest of the first row fills the column of another tile than its label's.
    hidden = magnitude + torch.tensor([[0.0, 1.0, 2.0, -4.0], [0.0, -1e4, 1e4, 0.0]])
    example = Example(hidden, torch.eye(4), torch.tensor([3, 1]), 4)
    found = run(HEADS[name], example, chunk_columns=2)
    agree(found, reference(example))
    assert (found["log_probs"] <= 0).all()


@both_heads
def test_bounds_hold_exactly(name: str) -> None:
    for scale in (1e-6, 1.0, 50.0, 3000.0):
        example = Example.draw(64, 8, 50, 50, scale=scale)
        found = run(HEADS[name], example, chunk_columns=7)
        assert (found["log_probs"] <= 0).all()
        assert (found["entropy"] >= 0).all()
        assert (found["entropy"] <= torch.tensor(math.log(50))).all()


@both_heads
def test_a_label_outside_the_vocabulary_harms_no_other_token(name: str) -> None:
    example = Example.draw()
    expected = reference(example, losses=lambda lp, e, t: torch.where(torch.arange(11)[t] == 4, 0.0, lp))
    example.labels[4] = -100
    losses = lambda lp, e, t: torch.where(torch.isnan(lp), 0.0, lp)  # noqa: E731
    found = run(HEADS[name], example, losses=losses)
    assert torch.isnan(found.pop("log_probs")).nonzero().tolist() == [[4]]
    agree(found, expected)
    assert not found["hidden"][4].any()


@both_heads
def test_no_tokens(name: str) -> None:
    found = run(HEADS[name], Example.draw(0))
    assert found["log_probs"].shape == found["entropy"].shape == (0,)
    assert found["hidden"].shape == (0, 16)
    assert not found["weight"].any()


@both_heads
def test_frozen_weight_or_hidden_states_get_no_gradient(name: str) -> None:
    example = Example.draw()
    expected = reference(example)
    for frozen in ("hidden", "weight"):
        hidden, weight = example.hidden.clone(), example.weight.clone()
        (weight if frozen == "hidden" else hidden).requires_grad_()
        main_grad = torch.zeros_like(weight) if frozen == "weight" else None
        losses = lambda lp, e, t: lp + 0.0 * e  # noqa: E731
        HEADS[name](hidden, weight, example.labels, losses, group=None, vocab_size=41, main_grad=main_grad)[
            0
        ].backward()
        trained = weight if frozen == "hidden" else hidden
        assert trained.grad is not None
        assert trained.grad.shape == expected[{"hidden": "weight", "weight": "hidden"}[frozen]].shape
        assert main_grad is None or not main_grad.any()


def test_the_loss_may_use_log_probs_alone_or_nothing() -> None:
    example = Example.draw()
    losses = lambda lp, e, t: -lp  # noqa: E731
    agree(run(fused_linear_token_loss, example, losses=losses), reference(example, losses=losses))
    found = run(fused_linear_token_loss, example, losses=lambda lp, e, t: torch.zeros(len(lp)))
    assert not found["hidden"].any()
    assert not found["weight"].any()


def test_a_scaled_loss_scales_the_gradient() -> None:
    example = Example.draw()
    hidden, weight = example.hidden.requires_grad_(), example.weight.requires_grad_()
    losses = lambda lp, e, t: lp  # noqa: E731
    loss, *_ = fused_linear_token_loss(hidden, weight, example.labels, losses, group=None, vocab_size=41)
    (-2.5 * loss).backward()
    expected = reference(example, losses=losses)
    torch.testing.assert_close(hidden.grad.double(), -2.5 * expected["hidden"], **FLOAT32)
    torch.testing.assert_close(weight.grad.double(), -2.5 * expected["weight"], atol=3e-6, rtol=1e-6)


def test_what_the_single_pass_cannot_do_is_refused() -> None:
    example = Example.draw()
    hidden, weight = example.hidden.requires_grad_(), example.weight.requires_grad_()
    losses = lambda lp, e, t: lp  # noqa: E731
    main_grad = torch.zeros_like(weight)
    arguments: Any = dict(group=None, vocab_size=41)
    loss, *_ = fused_linear_token_loss(hidden, weight, example.labels, losses, main_grad=main_grad, **arguments)
    with pytest.raises(RuntimeError, match=r"the loss's gradient is 2\.0; with main_grad it must be 1"):
        (2 * loss).backward()
    loss, *_ = fused_linear_token_loss(hidden, weight, example.labels, losses, **arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()
    with pytest.raises(ValueError, match=r"token_losses returned \(\) for 11 tokens"):
        fused_linear_token_loss(hidden, weight, example.labels, lambda lp, e, t: lp.sum(), **arguments)


@both_heads
def test_no_tensor_holds_the_logits(name: str) -> None:
    """64 tokens x 512 columns in chunks of 8 tokens: the single pass holds one chunk of them, the two passes a tile."""
    example = Example.draw(64, 16, 512, 512)
    with Watch() as watch:
        run(HEADS[name], example, chunk_tokens=8, chunk_columns=64)
    weight_or_hidden = 512 * 16
    assert watch.largest == weight_or_hidden
    with Watch() as watch:
        run(HEADS[name], example, chunk_tokens=32, chunk_columns=64)
    # 2 buffers of a tile in one allocation; a chunk's logits.
    assert watch.largest == (weight_or_hidden if name == "two_pass" else 32 * 512)


@both_heads
def test_memory_does_not_grow_with_the_tokens(name: str) -> None:
    """From 1k to 64k tokens, V = 1024: the largest tensor stays the buffer of a chunk, 1M elements or two of these,
    beside inputs and statistics of 4 numbers per token."""
    largest = []
    for num_tokens in (1024, 65536):
        example = Example.draw(num_tokens, 4, 1024, 1024)
        with Watch() as watch:
            run(HEADS[name], example, losses=lambda log_probs, entropy, tokens: -log_probs)
        largest.append(watch.largest)
    assert largest[0] == largest[1] <= 2 * 2**20


def test_a_forward_pass_without_gradient_keeps_nothing() -> None:
    example = Example.draw(64, 16, 512, 512)
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor)
    with torch.no_grad(), hooks:
        log_probs, entropy = fused_linear_log_probs(
            example.hidden, example.weight.requires_grad_(), example.labels, group=None, vocab_size=512
        )
    assert kept == []
    assert entropy is not None
    assert not log_probs.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 49}, "vocab_size is 49; 1 ranks of 48 columns"),
        ({"temperature": 0.0}, r"temperature is 0\.0; must be positive"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; must be at least 1"),
        ({"chunk_columns": 0}, "chunk_columns is 0; must be at least 1"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels \(3,\) of 1 ranks of 11 hidden states each"),
        ({"hidden": torch.zeros(11, 15)}, r"hidden \(11, 15\) must be \[T, H\]"),
        ({"hidden": torch.zeros(11, 16, dtype=torch.bfloat16)}, "hidden is torch.bfloat16, weight is torch.float32"),
        ({"main_grad": torch.zeros(48, 16, dtype=torch.bfloat16)}, "main_grad is torch.bfloat16"),
    ],
)
@both_heads
def test_arguments_that_make_no_sense(name: str, change: Any, message: str) -> None:
    example = Example.draw()
    arguments: Any = dict(
        hidden=example.hidden, weight=example.weight, labels=example.labels, group=None, vocab_size=41
    )
    arguments |= change
    with pytest.raises(ValueError, match=message):
        HEADS[name](losses=None, **arguments) if name == "two_pass" else HEADS[name](token_losses=None, **arguments)


@both_heads
@pytest.mark.parametrize("bug", ["label of every tile", "sums are not shifted", "own maximum"])
def test_planted_bugs_are_seen(name: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above fail on a head that counts the label in every tile, adds up sums about different maxima, or
    takes each tile's own maximum for that of the vocabulary in the gradient."""
    if bug == "label of every tile":
        real_add = vocab_statistics._add_at_label
        monkeypatch.setattr(vocab_statistics, "_add_at_label", lambda g, c, a: real_add(g, c % g.shape[1], a))
    elif bug == "sums are not shifted":
        real_join = vocab_statistics.join
        flat = lambda parts, t: real_join(torch.cat([parts[:, :1] * 0, parts[:, 1:]], 1), t)  # noqa: E731
        for head in ("fused_linear_log_probs", "fused_linear_token_loss"):
            monkeypatch.setattr(f"megatron_rl.parallel.{head}.join", flat)
    else:
        real_shift = vocab_statistics._shift
        monkeypatch.setattr(
            vocab_statistics, "_shift", lambda x, m, t, *, out: real_shift(x, x.amax(1) - 1e-3, t, out=out)
        )
    example = Example.draw()
    found = run(HEADS[name], example, chunk_columns=7)
    with pytest.raises(AssertionError):
        agree(found, reference(example))
