"""Whole distributions of a policy and of its teacher, position by position: exact divergences and smoothed targets.

Log-probs of single tokens come from the fused head, without logits. A divergence of two distributions needs the logits
of both; they are made here from hidden states, a chunk of tokens at a time, and once more in the backward pass, so that
no more than a chunk of either is ever held. Of the teacher's pass its hidden states are kept, [P, H] of each row, and
one copy of its output weight.

In bfloat16 the weight's gradient from here is rounded before it is added to the others in float32.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_rl.data.packing import DIVERGENCE, MEAN_LOG_PROBS
from megatron_rl.engine.head import LogProbHead
from megatron_rl.parallel.linear_tiles import slices
from megatron_rl.parallel.vocab_parallel_divergences import (
    Direction,
    vocab_parallel_divergence,
    vocab_parallel_log_probs_of,
)


class TeacherStates:
    """The `Extra` of a pass over the teacher, which remembers what its distributions are made of."""

    names: tuple[str, ...] = ()
    trains_output_weight = False

    def __init__(self) -> None:
        self._hidden: dict[int, Tensor] = {}
        self._weight: Tensor | None = None
        self._temperature = 1.0

    def __call__(self, head: LogProbHead, hidden: Tensor, labels: Tensor, number: int) -> Tensor:
        """[0, P]; see `Extra`."""
        if self._weight is None:
            # A copy: the weights of a reference are in the policy's place only for its pass.
            self._weight, self._temperature = head.weight.detach().clone(), head.softmax_temperature
        self._hidden[number] = _whole(head, hidden).detach()
        return hidden.new_empty((0, len(labels)), dtype=torch.float32)

    def logits(self, number: int, tokens: slice) -> Tensor:
        """[n, V/tp] of some tokens of a row."""
        assert self._weight is not None, "the teacher has not made its pass"
        return (self._hidden[number][tokens] @ self._weight.t()).float() / self._temperature


class Distributions:
    """The `Extra` of a policy that is compared with its teacher, or whose targets are smoothed."""

    trains_output_weight = True

    def __init__(
        self,
        *,
        teacher: TeacherStates | None = None,
        direction: Direction = "reverse",
        mixture: float = 0.5,
        mean_log_probs: bool = False,
        chunk_tokens: int = 256,
    ) -> None:
        """Args:
        teacher: after its pass over the same rows; None: no divergence.
        direction, mixture: see `vocab_parallel_divergence`.
        mean_log_probs: give the mean log-prob of the vocabulary.
        chunk_tokens: logits of so many tokens are held at once.
        """
        self.teacher, self.direction, self.mixture, self.chunk_tokens = teacher, direction, mixture, chunk_tokens
        self._wants_mean = mean_log_probs
        self.names = (*((MEAN_LOG_PROBS,) if mean_log_probs else ()), *((DIVERGENCE,) if teacher else ()))

    def __call__(self, head: LogProbHead, hidden: Tensor, labels: Tensor, number: int) -> Tensor:
        """[names, P] float32, nats; see `Extra`."""
        whole, weight = _whole(head, hidden), head.weight
        chunks = []
        for tokens in slices(len(labels), self.chunk_tokens):
            arguments = (head, whole[tokens], weight, labels[tokens], number, tokens)
            chunks.append(checkpoint(self._of_chunk, *arguments, use_reentrant=False))
        return torch.cat(chunks, 1)

    def _of_chunk(
        self, head: LogProbHead, hidden: Tensor, weight: Tensor, labels: Tensor, number: int, tokens: slice
    ) -> Tensor:
        logits = (hidden @ weight.t()).float() / head.softmax_temperature
        shard: Any = dict(group=head.groups.tp, vocab_size=head.vocab_size)
        found = []
        if self._wants_mean:
            found.append(vocab_parallel_log_probs_of(logits, labels[:, None], **shard)[1])
        if self.teacher is not None:
            kind: Any = dict(direction=self.direction, mixture=self.mixture)
            found.append(vocab_parallel_divergence(logits, self.teacher.logits(number, tokens), **shard, **kind))
        return torch.stack(found)


def _whole(head: LogProbHead, hidden: Tensor) -> Tensor:
    """[P, H]; backward, the ranks' gradients, each of its shard of the vocabulary, are added up."""
    if head.gpt.config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)  # type: ignore[no-any-return]
    return copy_to_tensor_model_parallel_region(hidden)  # type: ignore[no-any-return]
