"""Losses of whole distributions fused with the output layer, on one rank, against float64 of the whole logits.

The sharded case is in tests/distributed.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.parallel.fused_linear_logits_loss import LinearLogits, fused_linear_logits_loss
from tests.unit.parallel.linear_heads import Example, Watch
from tests.unit.parallel.logits_losses import LOGITS_LOSSES, logits_reference, run_logits_loss, top_of


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """1e-6 of a value; of a gradient's largest element, as its elements are sums of both signs; one rounding."""
    for key, value in found.items():
        exact = expected[key].double()
        rtol = 1e-6 + (torch.finfo(dtype).eps / 2 if key in ("hidden", "weight") else 0)
        atol = 1e-6 * max(float(exact.abs().max()), 0.0 if key in ("hidden", "weight") else 1.0)
        torch.testing.assert_close(value.double(), exact, atol=atol, rtol=rtol, msg=lambda m, k=key: f"{k}: {m}")


def test_label_smoothing_by_hand() -> None:
    # Logits log 1, log 2, log 5 of a weight that copies the hidden state: p = 1/8, 2/8, 5/8.
    hidden = torch.tensor([[1.0, 2.0, 5.0]]).log().requires_grad_()

    def losses(logits: Any) -> Any:
        log_probs, mean = logits.log_probs_of(logits.labels[:, None])
        return -0.7 * log_probs[:, 0] - 0.3 * mean, {"mean": mean}

    loss, values = fused_linear_logits_loss(hidden, torch.eye(3), torch.tensor([1]), losses, group=None, vocab_size=3)
    mean = (math.log(1 / 8) + math.log(2 / 8) + math.log(5 / 8)) / 3
    assert float(loss.detach()) == pytest.approx(-0.7 * math.log(2 / 8) - 0.3 * mean, rel=1e-6)
    assert float(values["mean"]) == pytest.approx(mean, rel=1e-6)
    loss.backward()
    # p_j less the target, which has 0.1 everywhere and 0.7 more at the label.
    assert hidden.grad is not None
    assert hidden.grad.tolist()[0] == pytest.approx([1 / 8 - 0.1, 2 / 8 - 0.8, 5 / 8 - 0.1], rel=1e-6)


@pytest.mark.parametrize("name", LOGITS_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("tiles", [{}, {"chunk_tokens": 1}, {"chunk_tokens": 4, "chunk_columns": 7}])
def test_values_and_gradients_agree_with_float64(name: str, dtype: Any, temperature: float, tiles: Any) -> None:
    example = Example.draw(dtype=dtype)
    found = run_logits_loss(name, example, temperature=temperature, **tiles)
    agree(found, logits_reference(name, example, temperature), dtype)
    assert not found["weight"][example.vocab_size :].any()


@pytest.mark.parametrize("name", LOGITS_LOSSES)
def test_main_grad_is_added_to_in_float32(name: str) -> None:
    example = Example.draw(dtype=torch.bfloat16)
    expected = logits_reference(name, example)["weight"]
    main_grad = expected.float() * 3
    found = run_logits_loss(name, example, main_grad=main_grad)
    assert "weight" not in found
    torch.testing.assert_close(main_grad.double(), 4 * expected, atol=4e-6 * float(expected.abs().max()), rtol=1e-6)


@pytest.mark.parametrize("name", LOGITS_LOSSES)
def test_without_gradient_the_values_are_the_same_and_nothing_is_formed(name: str) -> None:
    example = Example.draw()
    expected = run_logits_loss(name, example)
    with torch.no_grad():
        found = run_logits_loss(name, example)
    assert set(found) == {"loss", "value"}
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_no_tensor_holds_the_logits() -> None:
    """64 tokens x 512 columns in chunks of 4 tokens: nothing is larger than the weight, a quarter of them."""
    example = Example.draw(64, 16, 512, 512)
    top_of(example)  # whole logits, of the test
    for name in LOGITS_LOSSES:
        with Watch() as watch:
            run_logits_loss(name, example, chunk_tokens=4)
        assert watch.largest == 512 * 16, name


def test_no_tokens() -> None:
    for name in LOGITS_LOSSES:
        found = run_logits_loss(name, Example.draw(0))
        assert float(found["loss"]) == 0
        assert found["hidden"].shape == (0, 16)
        assert not found["weight"].any()


def test_a_loss_of_the_wrong_shape_or_without_gradient() -> None:
    example = Example.draw()
    arguments: Any = dict(group=None, vocab_size=41)
    hidden, weight = example.hidden.requires_grad_(), example.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"logits_losses returned \(\) for 11 tokens"):
        fused_linear_logits_loss(hidden, weight, example.labels, lambda x: (x.values.sum(), {}), **arguments)
    loss, _ = fused_linear_logits_loss(hidden, weight, example.labels, lambda x: (x.labels * 0.0, {}), **arguments)
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_linear_logits() -> None:
    example = Example.draw(dtype=torch.bfloat16)
    logits = LinearLogits(example.hidden, example.weight, None, columns=7)(slice(3, 9))
    assert logits.dtype == torch.float32
    expected = example.hidden[3:9].double() @ example.weight.double().t()
    torch.testing.assert_close(logits.double(), expected, atol=1e-6, rtol=1e-6)
