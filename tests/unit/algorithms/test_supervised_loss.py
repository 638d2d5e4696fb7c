"""The negative log-likelihood, through a softmax whose gradient is known."""

import pytest
import torch

from megatron_rl.algorithms.aggregation import weighted_sum
from megatron_rl.algorithms.supervised_loss import sft_loss


def check_gradient(loss_function):
    # d/dlogits of -log softmax(logits)[label] is softmax - onehot; with logits log(1), log(2), log(5): (1, 2, 5) / 8.
    logits = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log().requires_grad_()
    loss = loss_function(logits.log_softmax(1)[:, 1])
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(1.3862943611198906, rel=1e-15)  # log(8 / 2)
    torch.testing.assert_close(logits.grad, torch.tensor([[1, -6, 5]]) / 8.0, check_dtype=False, atol=1e-15, rtol=0)


def test_value_and_gradient():
    check_gradient(sft_loss)


def test_the_likelihood_itself_would_be_caught():
    with pytest.raises(AssertionError):
        check_gradient(lambda log_probs: log_probs)


def test_masked_tokens_may_hold_anything():
    log_probs = torch.tensor([-0.5, float("nan"), float("-inf")], requires_grad=True)
    loss = weighted_sum(sft_loss(log_probs), torch.tensor([0.25, 0.0, 0.0]))
    loss.backward()
    assert float(loss.detach()) == 0.125
    assert log_probs.grad.tolist() == [-0.25, 0.0, 0.0]
