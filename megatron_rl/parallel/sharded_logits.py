"""Logits of some tokens, sharded by vocabulary, and what a loss may ask of them: the place of a loss of whole
distributions, which then needs to know of no group.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.parallel.filtered_log_probs import filtered_log_probs
from megatron_rl.parallel.vocab_parallel import vocab_parallel_log_probs
from megatron_rl.parallel.vocab_parallel_divergences import (
    Direction,
    vocab_parallel_argmax,
    vocab_parallel_divergence,
    vocab_parallel_log_probs_of,
)


@dataclass(frozen=True)
class ShardedLogits:
    """Of n tokens. All but `argmax` is differentiable, and in nats; collectives are those of the functions called."""

    values: Tensor
    """[n, V/tp], this rank's columns, padding included."""
    labels: Tensor
    """[n] int64."""
    slots: slice
    """Which tokens of the head's call they are."""
    group: ProcessGroup | None
    vocab_size: int
    temperature: float
    """Divides the logits; it has not yet."""

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """Log-probs of the labels [n] and entropy [n]."""
        log_probs, entropy = vocab_parallel_log_probs(
            self.values, self.labels, group=self.group, vocab_size=self.vocab_size, temperature=self.temperature
        )
        assert entropy is not None
        return log_probs, entropy

    def log_probs_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [n, K] of the tokens ids [n, K], and the mean [n] of all log-probs, label smoothing's."""
        return vocab_parallel_log_probs_of(
            self.values, ids, group=self.group, vocab_size=self.vocab_size, temperature=self.temperature
        )

    def divergence(self, teacher: Tensor, direction: Direction, mixture: float = 0.5) -> Tensor:
        """Exact divergence [n] from a teacher's logits [n, V/tp]; see `vocab_parallel_divergence`."""
        return vocab_parallel_divergence(
            self.values,
            teacher,
            group=self.group,
            vocab_size=self.vocab_size,
            direction=direction,
            mixture=mixture,
            temperature=self.temperature,
        )

    def filtered_log_probs(self, *, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
        """Log-probs [n] of the labels under filtered sampling; see `filtered_log_probs`."""
        return filtered_log_probs(
            self.values,
            self.labels,
            group=self.group,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def argmax(self) -> Tensor:
        """[n] int64: the most probable tokens."""
        return vocab_parallel_argmax(self.values, group=self.group, vocab_size=self.vocab_size)
