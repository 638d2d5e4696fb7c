"""The output layer and a loss of whole distributions, token by token, in one pass: label smoothing, exact KL,
distillation, log-probs under filtered sampling.

As `fused_linear_token_loss`, for losses that look at more of a token's distribution than its label's log-prob and its
entropy. A chunk's logits are made, the loss is asked for its values and, through autograd, for its gradient by these
logits, and both products follow at once; then the chunk is forgotten. What the loss itself allocates is a few times the
chunk, which is therefore smaller.

    label smoothing      log_probs, mean = logits.log_probs_of(logits.labels[:, None])
                         label_smoothed_loss(log_probs[:, 0], mean, smoothing=0.1)
    distillation         logits.divergence(teacher(logits.slots), "forward"),   teacher = LinearLogits(...)
    the teacher's top K  top = with_tail(logits.log_probs_of(ids[logits.slots])[0])
                         distillation_loss(top, with_tail(teacher_log_probs[logits.slots]), ...)
    filtered sampling    policy_loss(logits.filtered_log_probs(top_p=0.9), ...)

each times the token's weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.parallel.fused_linear_token_loss import Tokens
from megatron_rl.parallel.linear_head import (
    HeadArguments,
    LinearHead,
    TileShape,
    WeightGradient,
    add_product,
    even_chunks,
    gather_tokens,
    product,
    product_dtype,
    reduce_tokens,
    slices,
    with_formed_gradient,
)
from megatron_rl.parallel.vocab_parallel_divergences import ShardedLogits
from megatron_rl.parallel.vocab_statistics import statistics_dtype


@dataclass(frozen=True)
class OfLogits:
    """Losses of whole distributions, where losses of single tokens (`TokenLosses`) could stand."""

    losses: Callable[[ShardedLogits, Tokens], tuple[Tensor, dict[str, Tensor]]]
    """(logits of n tokens, which tokens they are) -> as `LogitsLosses`."""


LogitsLosses = Callable[[ShardedLogits], tuple[Tensor, dict[str, Tensor]]]
"""Logits of n tokens -> [n] losses, each of its own token alone, and further values [n] by name, without gradient. The
names are the same for all tokens; the losses are the same on all ranks."""

_BUFFER_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits of a chunk, all columns: 8 MiB on a CPU, 512 MiB on CUDA. On a CPU label smoothing took up
to 5 times that, a divergence 7 times, filtered log-probs 24 times."""


def fused_linear_logits_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    logits_losses: LogitsLosses,
    **arguments: Unpack[HeadArguments],
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_t of logits_losses, with the gradient of hidden states and weight formed in this forward pass.

    Collectives, forward: those of logits_losses per chunk, one reduction of hidden gradients, with sequence parallelism
    a gather of the hidden states; backward: none. Where no gradient is asked for, the values alone are computed.

    Args:
        hidden, weight, labels, arguments: see `fused_linear_token_loss`; chunk_columns bounds what of the weight is
            widened at once.
        logits_losses: see LogitsLosses; differentiated by autograd, chunk by chunk.

    Returns:
        loss: scalar float32 (float64 for float64 inputs), differentiable once.
        values: [T] by name, without gradient; {} of no tokens.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit; before any collective.
        RuntimeError: the backward pass is run twice, or with main_grad begins with a gradient other than 1.
    """
    if arguments.get("chunk_tokens") is None:
        arguments["chunk_tokens"] = even_chunks(weight, len(labels), _BUFFER_ELEMENTS)
    head, main_grad = LinearHead.of(hidden, weight, labels, arguments), arguments.get("main_grad")
    shard, dtype = head.shard, statistics_dtype(hidden.dtype)
    wants_hidden, wants_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    grad_weight = WeightGradient(weight, main_grad, wanted=wants_weight)
    values: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        logits_of = LinearLogits(hidden, weight, head.shard.group, head.sequence_parallel, columns=head.tile.columns)
        grad_tokens = torch.empty_like(logits_of.tokens) if wants_hidden else None
        loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        for rows in slices(len(labels), head.tile.rows):
            logits = ShardedLogits(logits_of(rows), labels[rows], rows, shard.group, shard.vocab_size, head.temperature)
            losses, gradient, of_chunk = _differentiate(logits_losses, logits, wanted=wants_hidden or wants_weight)
            loss += losses
            for name, value in of_chunk.items():
                values.setdefault(name, []).append(value)
            if gradient is not None:
                grad_h = logits_of.gradient(rows, gradient, grad_weight)
            if grad_tokens is not None:
                grad_tokens[rows] = 0 if gradient is None else grad_h
        if grad_tokens is not None:
            grad_tokens = reduce_tokens(grad_tokens, shard.group, head.sequence_parallel)
    total = with_formed_gradient(
        loss.to(dtype),
        hidden,
        weight,
        grad_hidden=grad_tokens,
        grad_weight=grad_weight.result(),
        in_main_grad=wants_weight and main_grad is not None,
    )
    return total, {name: torch.cat(parts) for name, parts in values.items()}


class LinearLogits:
    """Logits of any of T tokens, made when they are asked for: a teacher's, that are never held together."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        group: ProcessGroup | None,
        sequence_parallel: bool = False,
        *,
        columns: int | None = None,
    ) -> None:
        """Args:
        hidden: [T, H]; with sequence_parallel [T/tp, H], which are gathered here, by a collective.
        weight: [V/tp, H] of hidden's dtype.
        group: the tensor-parallel group, or None.
        columns: of the weight that are widened at once; None: what suits the device.
        """
        self.tokens = gather_tokens(hidden.detach(), group, sequence_parallel)
        self.weight = weight.detach()
        self.columns = columns or TileShape.of(weight, len(self.tokens), None, None).columns
        self.dtype = statistics_dtype(hidden.dtype)

    def __call__(self, rows: slice) -> Tensor:
        """[n, V/tp] float32 (float64 for float64 inputs) of the tokens `rows`."""
        h = self.tokens[rows].to(product_dtype(self.tokens))
        logits = h.new_empty(len(h), len(self.weight), dtype=self.dtype)
        for tile in slices(len(self.weight), self.columns):
            product(h, self.weight[tile].to(h.dtype).t(), out=logits[:, tile])
        return logits

    def gradient(self, rows: slice, gradient: Tensor, grad_weight: WeightGradient) -> Tensor:
        """The hidden states' gradient [n, H], given the logits' [n, V/tp]; the weight's is added to grad_weight."""
        h = self.tokens[rows].to(product_dtype(self.tokens))
        grad_h = torch.zeros_like(h, dtype=self.dtype)
        for tile in slices(len(self.weight), self.columns):
            g = gradient[:, tile].to(h.dtype)
            add_product(g, self.weight[tile].to(h.dtype), out=grad_h)
            grad_weight.add(tile, g, h)
        return grad_h


def _differentiate(
    logits_losses: LogitsLosses, logits: ShardedLogits, *, wanted: bool
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """The chunk's loss (float64), its gradient by the logits, None where it has none or none is wanted, and values."""
    with torch.set_grad_enabled(wanted):
        x = logits.values.requires_grad_(wanted)
        losses, values = logits_losses(logits)
        if losses.shape != logits.labels.shape:
            raise ValueError(f"logits_losses returned {tuple(losses.shape)} for {len(logits.labels)} tokens")
        gradient = torch.autograd.grad(losses.sum(), x)[0] if losses.requires_grad else None
    return losses.detach().double().sum(), gradient, {name: value.detach() for name, value in values.items()}
