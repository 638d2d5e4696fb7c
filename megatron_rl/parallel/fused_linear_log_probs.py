"""Log-probs and entropy from hidden states and the sharded output weight, without ever holding the logits.

The forward pass makes the logits tile by tile, keeps each tile's statistics (`vocab_statistics`) and forgets the tile;
the backward pass makes each tile again, turns it into its gradient, and multiplies that with the weight and with the
hidden states: four products of T x H x V/tp where stored logits take three. What a training step keeps is the hidden
states, [T/tp, H] of them under sequence parallelism, and a few numbers per token.

Where the loss of a token depends on its own log-prob and entropy alone, `fused_linear_token_loss` saves the fourth.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl.parallel.linear_tiles import (
    TileShape,
    WeightGradient,
    add_product,
    gather_tokens,
    product,
    product_dtype,
    reduce_tokens,
    slices,
)
from megatron_rl.parallel.vocab_parallel import check_temperature
from megatron_rl.parallel.vocab_statistics import (
    GradientFactors,
    Normalizer,
    VocabShard,
    gradient_of_logits,
    join,
    no_statistics,
    normalize,
    reduce_tile,
    statistics_dtype,
)


@dataclass(frozen=True)
class LinearHead:
    """What one call of the head is asked, but for its tensors."""

    shard: VocabShard
    temperature: float
    entropy: bool
    sequence_parallel: bool
    tile: TileShape

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        group: ProcessGroup | None,
        vocab_size: int,
        temperature: float,
        entropy: bool,
        sequence_parallel: bool,
        main_grad: Tensor | None,
        chunk_tokens: int | None,
        chunk_columns: int | None,
    ) -> "LinearHead":
        """Checked; see `fused_linear_log_probs` for the arguments and errors."""
        shard = VocabShard(group, vocab_size, len(weight))
        ranks = shard.num_ranks if sequence_parallel else 1
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(f"hidden {tuple(hidden.shape)} must be [T, H] and weight {tuple(weight.shape)} [V/tp, H]")
        if hidden.dtype != weight.dtype:
            raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}; must be the same")
        if labels.shape != (len(hidden) * ranks,):
            raise ValueError(f"labels {tuple(labels.shape)} of {ranks} ranks of {len(hidden)} hidden states each")
        if main_grad is not None and (main_grad.shape != weight.shape or main_grad.dtype != torch.float32):
            raise ValueError(f"main_grad is {main_grad.dtype} {tuple(main_grad.shape)}; must be float32, like weight")
        check_temperature(temperature)
        tile = TileShape.of(weight, len(labels), chunk_tokens, chunk_columns)
        return LinearHead(shard, float(temperature), entropy, sequence_parallel, tile)


def fused_linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    entropy: bool = True,
    sequence_parallel: bool = False,
    main_grad: Tensor | None = None,
    chunk_tokens: int | None = None,
    chunk_columns: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label, and the entropy, under softmax(hidden @ weight.T / temperature).

    As `vocab_parallel_log_probs` of these logits, with the gradient of the output layer included: that of the hidden
    states is summed over the group. Collectives: one all-gather of statistics forward, one reduction of hidden
    gradients backward; with sequence parallelism a gather of the hidden states before either.

    Args:
        hidden: [T, H], equal on all ranks; with sequence_parallel [T/tp, H], this rank's tokens.
        weight: [V/tp, H] of hidden's dtype, this rank's rows; tied to the embedding or not.
        labels: [T] int64, equal on all ranks. A label outside [0, vocab_size) has log-prob nan.
        group: the tensor-parallel group; None: this rank holds the whole vocabulary.
        vocab_size: rows, over all ranks, that are tokens; the others have probability exactly 0.
        temperature: divides the logits, > 0.
        entropy: also compute the entropy.
        sequence_parallel: the tokens are split over the group, in rank order.
        main_grad: [V/tp, H] float32, to which the backward pass adds the weight's gradient. Autograd is then told of
            none. None: autograd gets it in the weight's dtype, summed in float32.
        chunk_tokens, chunk_columns: largest tile of logits; None: what suits the device.

    Returns:
        log_probs [T], nats, <= 0, and entropy [T], nats, in [0, log vocab_size], or None. Both are float32 (float64 for
        float64 inputs), on all ranks, and differentiable once.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit; before any collective.
    """
    head = LinearHead.of(
        hidden,
        weight,
        labels,
        group=group,
        vocab_size=vocab_size,
        temperature=temperature,
        entropy=entropy,
        sequence_parallel=sequence_parallel,
        main_grad=main_grad,
        chunk_tokens=chunk_tokens,
        chunk_columns=chunk_columns,
    )
    outputs: tuple[Tensor, Tensor | None] = _FusedLinearLogProbs.apply(hidden, weight, labels, main_grad, head)
    return outputs


class _FusedLinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, main_grad: Tensor | None, head: LinearHead
    ) -> tuple[Tensor, Tensor | None]:
        tokens = gather_tokens(hidden, head.shard.group, head.sequence_parallel)
        dtype, columns = statistics_dtype(hidden.dtype), head.shard.local(labels)
        local = no_statistics(len(tokens), head.entropy, dtype=torch.float64, device=hidden.device)
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
                        entropy=head.entropy,
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
        hidden, weight, columns, maximum, log_sum, entropy = ctx.saved_tensors
        head: LinearHead = ctx.head
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 5
        normalizer = Normalizer(maximum, log_sum, entropy)
        factors = GradientFactors.of(grad_log_probs, grad_entropy, normalizer, head.temperature)
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
        return grad_tokens, grad_weight.result(), None, None, None


def buffers(weight: Tensor, tile: TileShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two buffers of a tile's size, which every tile uses again: fresh memory would cost more than the arithmetic."""
    return tuple(weight.new_empty(2, tile.rows * tile.columns, dtype=dtype).unbind())  # type: ignore[return-value]


def fit(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows x columns elements of a flat buffer, as a contiguous matrix."""
    return buffer[: rows * columns].view(rows, columns)
