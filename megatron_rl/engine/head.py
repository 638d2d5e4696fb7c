"""The policy's head: from the hidden states of a micro-batch to its log-probs and entropy, or straight to its loss.

The logits never exist. Core's GPTModel is made to return the hidden states after its last norm, as an inner pipeline
stage would; the output layer's weight is applied here, fused with the softmax (`parallel.fused_linear_log_probs`). Tied
to the embedding, that is the embedding's weight, or the last pipeline stage's copy of it.

The weight's gradient goes straight into `main_grad`, the float32 buffer that core's DistributedDataParallel reduces.
Autograd is told of no gradient then; where the weight is not an embedding too, whose gradient autograd brings, a
stand-in without memory tells DistributedDataParallel's hook that the parameter is done.

What some algorithms want of the hidden states besides, the values of a critic, is an `Extra` of a pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_rl.parallel.fused_linear_log_probs import fused_linear_log_probs
from megatron_rl.parallel.fused_linear_logits_loss import OfLogits, fused_linear_logits_loss
from megatron_rl.parallel.fused_linear_token_loss import TokenLosses, fused_linear_token_loss
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.vocab_parallel_divergences import ShardedLogits


@dataclass(frozen=True)
class TokenLoss:
    """The loss of some tokens, whose gradient is formed already."""

    loss: Tensor
    """Scalar; its backward pass passes that gradient on to the hidden states."""
    outputs: Tensor
    """[2, P] float32: log-probs and entropy, without gradient."""
    values: dict[str, Tensor]
    """[P] each, without gradient: what losses of whole distributions give beside."""


class Extra(Protocol):
    """What a pass computes from the last hidden states besides log-probs and entropy."""

    names: tuple[str, ...]
    """Of its outputs, by which the objective finds them in `micro_batch.per_token`."""

    def __call__(self, gpt: GPTModel, hidden: Tensor) -> Tensor:
        """[len(names), P] float32 of hidden states [P, H], or this rank's [P/tp, H] under sequence parallelism."""
        ...


class LogProbHead:
    """Runs a model's last stage and gives log-probs and entropy; `temperature` and `extras` are set before a pass."""

    names = ("log_probs", "entropy")
    """Of the outputs that objectives get as arguments."""

    def __init__(self, gpt: GPTModel, groups: Groups, vocab_size: int) -> None:
        """Args:
        gpt: the model chunk that holds the output layer, or on other stages any: those never call.
        groups: this rank's.
        vocab_size: tokens; the weight's further rows are padding.
        """
        self.gpt = gpt
        self.groups = groups
        self.vocab_size = vocab_size
        self.temperature = 1.0
        self.extras: Sequence[Extra] = ()

    @property
    def weight(self) -> Any:
        """[V/tp, H]: the output layer's, which tied embeddings share."""
        gpt = self.gpt
        if gpt.share_embeddings_and_output_weights:
            return gpt.shared_embedding_or_output_weight()
        return gpt.output_layer.weight

    def __call__(
        self, forward: Callable[[], Tensor], labels: Tensor, token_losses: TokenLosses | OfLogits | None
    ) -> Tensor | TokenLoss:
        """Run the last stage on P tokens.

        Args:
            forward: runs the model.
            labels: [P] int64.
            token_losses: the loss, if it is to be differentiated in this forward pass; without extras.

        Returns:
            [2 or more, P] float32: log-probs and entropy, nats, and what the extras give; with token_losses the loss.
        """
        hidden = self.hidden_states(forward)
        weight = self.weight
        trains = torch.is_grad_enabled()
        main_grad = getattr(weight, "main_grad", None) if trains and weight.requires_grad else None
        arguments: Any = dict(
            group=self.groups.tp,
            vocab_size=self.vocab_size,
            temperature=self.temperature / self.logit_scale,
            sequence_parallel=self.gpt.config.sequence_parallel,
            main_grad=main_grad,
        )
        if trains and token_losses is not None:
            values: dict[str, Tensor] = {}
            assert not self.extras
            if isinstance(token_losses, OfLogits):
                losses = _with_outputs(token_losses)
                loss, values = fused_linear_logits_loss(hidden, weight, labels, losses, **arguments)
                outputs = [values.pop(name) for name in self.names]
            else:
                loss, *outputs = fused_linear_token_loss(hidden, weight, labels, token_losses, **arguments)
            self._announce(loss, main_grad)
            return TokenLoss(loss, torch.stack(outputs), values)
        log_probs, entropy = fused_linear_log_probs(hidden, weight, labels, **arguments)
        assert entropy is not None
        self._announce(log_probs, main_grad)
        extras = [extra(self.gpt, hidden) for extra in self.extras]
        return torch.cat([torch.stack([log_probs, entropy]), *extras])

    def hidden_states(self, forward: Callable[[], Tensor]) -> Tensor:
        """[P, H] after the last norm, under sequence parallelism [P/tp, H]: what the output layer is applied to."""
        with self._without_output_layer():
            return forward().squeeze(1)

    @property
    def logit_scale(self) -> float:
        """The factor that newer releases of core apply to the logits (muP); 1 in the others."""
        scale = getattr(self.gpt, "_scale_logits", None)
        return 1.0 if scale is None else float(scale(torch.ones(())))

    @contextmanager
    def _without_output_layer(self) -> Iterator[None]:
        """Inside, the model ends before its output layer."""
        self.gpt.post_process = False
        try:
            yield
        finally:
            self.gpt.post_process = True

    def _announce(self, output: Tensor, main_grad: Tensor | None) -> None:
        """Have the backward pass of `output` mark the weight's gradient as added to main_grad."""
        weight = self.weight
        is_embedding = self.gpt.share_embeddings_and_output_weights and self.gpt.pre_process
        if main_grad is None or is_embedding or output.grad_fn is None:
            return

        def mark(*_: Any) -> None:
            weight.grad_added_to_main_grad = True
            weight.grad = weight.new_zeros(()).expand_as(weight)

        output.grad_fn.register_hook(mark)


def _with_outputs(of_logits: OfLogits) -> Callable[[ShardedLogits], tuple[Tensor, dict[str, Tensor]]]:
    """The losses, with log-probs and entropy among their values."""

    def losses(logits: ShardedLogits) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            outputs = dict(zip(LogProbHead.names, logits.log_probs(), strict=True))
        found, values = of_logits.losses(logits, logits.slots)
        return found, values | outputs

    return losses
