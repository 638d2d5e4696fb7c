"""An objective's losses token by token are its loss: same value and gradient, in one piece, in slices and by index."""

import itertools
from typing import Any

import pytest
import torch

from megatron_rl.algorithms.aggregation import GlobalCounts
from megatron_rl.config.schema import (
    AlgorithmConfig,
    CorrectionConfig,
    CorrectionLevel,
    CorrectionMethod,
    KLConfig,
    PolicyLossConfig,
)
from megatron_rl.data.packing import MicroBatch
from megatron_rl.objectives.losses import POLICY_GRADIENT_LOSSES, TOKEN_LOSSES, resolve_policy_loss
from megatron_rl.objectives.objectives import PolicyGradientObjective, SupervisedObjective

NUM_TOKENS = 12
COUNTS = GlobalCounts(num_tokens=20.0, num_sequences=3.0)


def draw(scale: float, shift: float, seed: int) -> torch.Tensor:
    return shift + scale * torch.randn(NUM_TOKENS, generator=torch.Generator().manual_seed(seed))


def micro_batch() -> MicroBatch:
    per_token = {name: draw(0.3, -2.0, seed) for seed, name in enumerate(("old_log_probs", "rollout_log_probs"))}
    per_token |= {"ref_log_probs": draw(0.3, -2.0, 2), "advantages": draw(1.0, 0.0, 3)}
    mask = torch.ones(NUM_TOKENS)
    mask[[0, 1, 7, 11]] = 0
    for values in per_token.values():
        values[mask == 0] = torch.nan
    tokens = torch.arange(NUM_TOKENS)
    bounds = torch.tensor([0, 7, 11, 12], dtype=torch.int32)
    return MicroBatch(tokens, tokens, mask, tokens, bounds, 7, per_token, (0, 1))


def objective(on_policy: bool, **algorithm: Any) -> PolicyGradientObjective:
    config = AlgorithmConfig(**algorithm)
    loss = resolve_policy_loss(config.policy_loss)
    return PolicyGradientObjective(
        config, COUNTS, token_sum_norm=4.0, policy_loss=loss, on_policy=on_policy, kl_coefficient=0.1
    )


def values_and_gradients(function: Any) -> list[torch.Tensor]:
    """Of the sum of function(log_probs, entropy): the loss, and its gradients; 0 where an input is not in it."""
    inputs = [draw(0.3, -2.0, 4).requires_grad_(), draw(0.3, 2.0, 5).requires_grad_()]
    loss = function(*inputs)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [loss.detach(), *(torch.zeros(NUM_TOKENS) if g is None else g for g in gradients)]


def assert_same(whole: Any, packed: MicroBatch) -> None:
    expected = values_and_gradients(lambda log_probs, entropy: whole(log_probs, entropy, packed)[0])
    for pieces in (
        [slice(None)],
        [slice(0, 5), slice(5, 6), slice(6, NUM_TOKENS)],
        [torch.tensor([3, 0, 11, 5, 7, 1]), torch.tensor([2, 4, 6, 8, 9, 10])],
    ):
        losses = whole.token_losses(packed)

        def total(log_probs: Any, entropy: Any, losses: Any = losses, pieces: Any = pieces) -> Any:
            return torch.cat([losses(log_probs[piece], entropy[piece], piece) for piece in pieces]).sum()

        for found, one in zip(values_and_gradients(total), expected, strict=True):
            # float32 sums of 12 numbers in another order.
            torch.testing.assert_close(found, one, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("entropy", [0.0, 0.01])
def test_policy_gradients(name: str, on_policy: bool, entropy: float) -> None:
    kl = KLConfig(coefficient=0.1)
    whole = objective(on_policy, policy_loss=PolicyLossConfig(name=name), kl=kl, entropy_coefficient=entropy)
    assert_same(whole, micro_batch())


@pytest.mark.parametrize("level", list(CorrectionLevel))
def test_corrections_are_known_before_the_pass_when_off_policy(level: CorrectionLevel) -> None:
    correction = CorrectionConfig(method=CorrectionMethod.truncate, level=level)
    assert_same(objective(False, correction=correction), micro_batch())
    assert objective(True, correction=correction).token_losses(micro_batch()) is None


def test_supervised() -> None:
    assert_same(SupervisedObjective(AlgorithmConfig(), COUNTS, token_sum_norm=4.0), micro_batch())


def test_losses_of_whole_sequences_are_not_said_token_by_token() -> None:
    """What is called separable is: a token's loss does not move when another token's log-prob does."""
    packed = micro_batch()
    for name, on_policy in itertools.product(POLICY_GRADIENT_LOSSES, (False, True)):
        whole = objective(on_policy, policy_loss=PolicyLossConfig(name=name))
        assert (whole.token_losses(packed) is not None) == (name in TOKEN_LOSSES)
    for name in POLICY_GRADIENT_LOSSES:
        loss = resolve_policy_loss(PolicyLossConfig(name=name))
        log_probs = torch.where(packed.loss_mask > 0, draw(0.3, -2.0, 4), 0.0)
        arguments = {key: values.nan_to_num() for key, values in packed.per_token.items()}
        arguments |= dict(entropy=log_probs, loss_mask=packed.loss_mask, cu_seqlens=packed.cu_seqlens)
        moved = log_probs.clone()
        moved[3] += 0.5
        change = (loss(log_probs=moved, **arguments) - loss(log_probs=log_probs, **arguments)).abs()
        change[3] = 0
        assert bool(change.max() > 1e-3) == (name not in TOKEN_LOSSES), name
