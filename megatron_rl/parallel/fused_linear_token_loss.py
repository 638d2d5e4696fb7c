"""The output layer and a loss of single tokens in one pass: three matrix products, as many as with stored logits.

A loss is separable by tokens if it is sum_t L_t(log_prob_t, entropy_t): token-level policy gradients, supervised
fine-tuning, their KL penalties. Its gradient with respect to the logits of a chunk of tokens is then known as soon as
the chunk is: the forward pass makes the chunk's logits, all columns of it, asks the loss for dL/dlog_prob and
dL/dentropy, turns the logits into their gradient where they lie, and multiplies that with the weight and the hidden
states. Nothing is made twice. What is kept for the backward pass is the gradient of the hidden states; there it is only
scaled. The memory is one chunk of logits, whose size is bounded and does not grow with T.

A loss that looks at several tokens at once (sequence-level ratios, pairs of sequences) takes `fused_linear_log_probs`.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from megatron_rl.parallel.linear_head import (
    HeadArguments,
    LinearHead,
    WeightGradient,
    add_product,
    even_chunks,
    fit,
    gather_tokens,
    product,
    product_dtype,
    reduce_tokens,
    slices,
    with_formed_gradient,
)
from megatron_rl.parallel.vocab_statistics import (
    GradientFactors,
    gradient_of_exponentials,
    join,
    no_statistics,
    normalize,
    reduce_tile,
    statistics_dtype,
)

Tokens = slice | Tensor
"""Which of the T tokens: a slice, or [n] int64 indices."""
TokenLosses = Callable[[Tensor, Tensor, Any], Tensor]
"""(log_probs [n], entropy [n], their `Tokens`) -> [n] losses, each of its own token alone."""

_BUFFER_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of a chunk, all columns: 64 MiB on a CPU, 1 GiB on CUDA, where products want more rows."""


def fused_linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_losses: TokenLosses,
    **arguments: Unpack[HeadArguments],
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_t of token_losses, with the gradient of hidden states and weight formed in this forward pass.

    Collectives, forward: one all-gather of statistics per chunk, one reduction of hidden gradients, with sequence
    parallelism a gather of the hidden states; backward: none.

    Args:
        hidden, weight, labels: see `fused_linear_log_probs`.
        token_losses: see TokenLosses; called with slices; differentiated by autograd, chunk by chunk. The same on
            all ranks.
        arguments: see `HeadArguments`. main_grad is added to in this forward pass: call it once per backward pass, and
            let that begin with gradient 1. chunk_tokens bounds the buffer, [chunk_tokens, V/tp] float32.

    Returns:
        loss: scalar float32 (float64 for float64 inputs), differentiable once.
        log_probs, entropy: [T] float32 (float64), nats, without gradient.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit; before any collective.
        RuntimeError: the backward pass is run twice, or with main_grad begins with a gradient other than 1.
    """
    if arguments.get("chunk_tokens") is None:
        arguments["chunk_tokens"] = even_chunks(weight, len(labels), _BUFFER_ELEMENTS)
    head, main_grad = LinearHead.of(hidden, weight, labels, arguments), arguments.get("main_grad")
    wants_hidden, wants_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    with torch.no_grad():
        tokens = gather_tokens(hidden, head.shard.group, head.sequence_parallel)
        chunks = _Chunks(tokens, weight, head, WeightGradient(weight, main_grad, wanted=wants_weight))
        log_probs = tokens.new_empty(len(tokens), dtype=chunks.dtype)
        entropy = torch.empty_like(log_probs)
        grad_tokens = torch.empty_like(tokens) if wants_hidden else None
        loss = torch.zeros((), dtype=torch.float64, device=tokens.device)
        for rows in slices(len(tokens), head.tile.rows):
            of_chunk = chunks.forward(rows, labels[rows], token_losses)
            log_probs[rows], entropy[rows], grad_h = of_chunk[1:]
            loss += of_chunk[0]
            if grad_tokens is not None:
                grad_tokens[rows] = grad_h
        if grad_tokens is not None:
            grad_tokens = reduce_tokens(grad_tokens, head.shard.group, head.sequence_parallel)
    loss = with_formed_gradient(
        loss.to(chunks.dtype),
        hidden,
        weight,
        grad_hidden=grad_tokens,
        grad_weight=chunks.grad_weight.result(),
        in_main_grad=wants_weight and main_grad is not None,
    )
    return loss, log_probs, entropy


class _Chunks:
    """The work on one chunk of tokens after another, in buffers that all chunks share."""

    def __init__(self, tokens: Tensor, weight: Tensor, head: LinearHead, grad_weight: WeightGradient) -> None:
        self.tokens, self.weight, self.head, self.grad_weight = tokens, weight, head, grad_weight
        self.dtype = statistics_dtype(tokens.dtype)
        self.tiles = list(slices(head.shard.num_valid, head.tile.columns))
        self.scratch = weight.new_empty(head.tile.rows * head.tile.columns, dtype=self.dtype)
        self.grad_h = weight.new_empty(head.tile.rows * weight.shape[1], dtype=self.dtype)
        # Tile after tile, each a contiguous matrix.
        self.logits = weight.new_empty(head.tile.rows * max(1, head.shard.num_valid), dtype=self.dtype)

    def forward(self, rows: slice, labels: Tensor, token_losses: TokenLosses) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, log-probs [C], entropy [C] and gradient of the hidden states [C, H] of the chunk `rows`."""
        temperature, shard = self.head.temperature, self.head.shard
        h, column = self.tokens[rows].to(product_dtype(self.tokens)), shard.local(labels)
        exponentials = [fit(self.logits[len(h) * tile.start :], len(h), tile.stop - tile.start) for tile in self.tiles]
        parts = []
        for tile, x in zip(self.tiles, exponentials, strict=True):
            product(h, self.weight[tile].to(h.dtype).t(), out=x)
            spare = fit(self.scratch, *x.shape)
            of_label = column - tile.start
            parts.append(
                reduce_tile(x, of_label, temperature=temperature, entropy=True, out=x, scratch=spare, keep=True)
            )
        if parts:
            local = join(torch.stack(parts), temperature)
        else:
            local = no_statistics(len(h), True, dtype=self.dtype, device=h.device)
        log_probs, normalizer = normalize(local, labels, shard, temperature, dtype=self.dtype)
        assert normalizer.entropy is not None
        log_probs, entropy = log_probs.to(self.dtype), normalizer.entropy.to(self.dtype)
        loss, by_log_probs, by_entropy = _differentiate(token_losses, log_probs, entropy, rows)
        factors = GradientFactors.of(by_log_probs, by_entropy, normalizer, temperature)
        grad_h = fit(self.grad_h, *h.shape).zero_()
        for tile, e, part in zip(self.tiles, exponentials, parts, strict=True):
            shift = ((part[0] - normalizer.maximum) / temperature).to(self.dtype)
            gradient = e if h.dtype == e.dtype else torch.empty_like(e, dtype=h.dtype)
            gradient_of_exponentials(
                e, column - tile.start, shift, factors, out=gradient, scratch=fit(self.scratch, *e.shape)
            )
            add_product(gradient, self.weight[tile].to(h.dtype), out=grad_h)
            self.grad_weight.add(tile, gradient, h)
        return loss, log_probs, entropy, grad_h


def _differentiate(
    token_losses: TokenLosses, log_probs: Tensor, entropy: Tensor, rows: slice
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The chunk's loss (float64), and its gradients with respect to log-probs and entropy; None where it has none."""
    with torch.enable_grad():
        inputs = log_probs.detach().requires_grad_(), entropy.detach().requires_grad_()
        losses = token_losses(*inputs, rows)
        if losses.shape != log_probs.shape:
            raise ValueError(f"token_losses returned {tuple(losses.shape)} for {len(log_probs)} tokens")
        gradients: tuple[Tensor | None, ...] = (None, None)
        if losses.requires_grad:
            gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    return losses.detach().double().sum(), gradients[0], gradients[1]
