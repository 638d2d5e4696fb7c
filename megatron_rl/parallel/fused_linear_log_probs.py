"""Log-probs and entropy from hidden states and the sharded output weight, without ever holding the logits.

The forward pass makes the logits tile by tile, keeps each tile's statistics (`vocab_statistics`) and forgets the tile;
the backward pass makes each tile again, turns it into its gradient, and multiplies that with the weight and with the
hidden states: four products of T x H x V/tp where stored logits take three. What a training step keeps is the hidden
states, [T/tp, H] of them under sequence parallelism, and a few numbers per token.

Where the loss of a token depends on its own log-prob and entropy alone, `fused_linear_token_loss` saves the fourth.
"""

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.parallel.linear_head import (
    HeadArguments,
    LinearHead,
    WeightGradient,
    add_product,
    buffers,
    fit,
    gather_tokens,
    product,
    product_dtype,
    reduce_tokens,
    slices,
)
from megatron_rl.parallel.vocab_statistics import (
    GradientFactors,
    Normalizer,
    gradient_of_logits,
    join,
    no_statistics,
    normalize,
    reduce_tile,
    statistics_dtype,
)


def fused_linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    entropy: bool = True,
    **arguments: Unpack[HeadArguments],
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label, and the entropy, under softmax(hidden @ weight.T / temperature).

    As `vocab_parallel_log_probs` of these logits, with the gradient of the output layer included: that of the hidden
    states is summed over the group. Collectives: one all-gather of statistics forward, one reduction of hidden
    gradients backward; with sequence parallelism a gather of the hidden states before either.

    Args:
        hidden: [T, H], equal on all ranks; with sequence_parallel [T/tp, H], this rank's tokens.
        weight: [V/tp, H] of hidden's dtype, this rank's rows; tied to the embedding or not.
        labels: [T] int64, equal on all ranks. A label outside [0, vocab_size) has log-prob nan.
        entropy: also compute the entropy.
        arguments: see `HeadArguments`; main_grad is added to in the backward pass.

    Returns:
        log_probs [T], nats, <= 0, and entropy [T], nats, in [0, log vocab_size], or None. Both are float32 (float64 for
        float64 inputs), on all ranks, and differentiable once.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit; before any collective.
    """
    head = LinearHead.of(hidden, weight, labels, arguments)
    outputs: tuple[Tensor, Tensor | None] = _FusedLinearLogProbs.apply(
        hidden, weight, labels, arguments.get("main_grad"), head, entropy
    )
    return outputs


class _FusedLinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        main_grad: Tensor | None,
        head: LinearHead,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = gather_tokens(hidden, head.shard.group, head.sequence_parallel)
        dtype, columns = statistics_dtype(hidden.dtype), head.shard.local(labels)
        local = no_statistics(len(tokens), entropy, dtype=torch.float64, device=hidden.device)
        x, scratch = buffers(weight, head.tile, dtype)
        for rows in slices(len(tokens), head.tile.rows):
            h, parts = tokens[rows].to(product_dtype(tokens)), []
            for tile in slices(head.shard.num_valid, head.tile.columns):
                w = weight[tile].to(h.dtype)
                logits, spare = fit(x, len(h), len(w)), fit(scratch, len(h), len(w))
                product(h, w.t(), out=logits)
                parts.append(
                    reduce_tile(
                        logits,
                        columns[rows] - tile.start,
                        temperature=head.temperature,
                        entropy=entropy,
                        out=logits,
                        scratch=spare,
                    )
                )
            if parts:
                local[:, rows] = join(torch.stack(parts), head.temperature)
        log_probs, normalizer = normalize(local, labels, head.shard, head.temperature, dtype=dtype)
        ctx.save_for_backward(hidden, weight, columns, normalizer.maximum, normalizer.log_sum, normalizer.entropy)
        ctx.head, ctx.main_grad = head, main_grad  # main_grad changes before the backward pass, and may
        ctx.set_materialize_grads(False)
        return log_probs.to(dtype), None if normalizer.entropy is None else normalizer.entropy.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, *of_tokens = ctx.saved_tensors
        head: LinearHead = ctx.head
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 6
        normalizer = Normalizer(*of_tokens)
        factors = GradientFactors.of(grad_log_probs, grad_entropy, normalizer, head.temperature)
        maximum = normalizer.maximum
        tokens = gather_tokens(hidden, head.shard.group, head.sequence_parallel)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_weight = WeightGradient(weight, ctx.main_grad, wanted=wants_weight)
        grad_tokens = torch.empty_like(tokens) if wants_hidden else None
        x, scratch = buffers(weight, head.tile, maximum.dtype)
        for rows in slices(len(tokens), head.tile.rows):
            h = tokens[rows].to(product_dtype(tokens))
            grad_h = torch.zeros_like(h, dtype=maximum.dtype)
            for tile in slices(head.shard.num_valid, head.tile.columns):
                w = weight[tile].to(h.dtype)
                logits, spare = fit(x, len(h), len(w)), fit(scratch, len(h), len(w))
                product(h, w.t(), out=logits)
                gradient = logits if h.dtype == logits.dtype else torch.empty_like(logits, dtype=h.dtype)
                gradient_of_logits(
                    logits,
                    columns[rows] - tile.start,
                    maximum[rows],
                    factors[rows],
                    temperature=head.temperature,
                    out=gradient,
                    scratch=spare,
                )
                if wants_hidden:
                    add_product(gradient, w, out=grad_h)
                grad_weight.add(tile, gradient, h)
            if grad_tokens is not None:
                grad_tokens[rows] = grad_h
        if grad_tokens is not None:
            grad_tokens = reduce_tokens(grad_tokens, head.shard.group, head.sequence_parallel)
        return grad_tokens, grad_weight.result(), None, None, None, None
