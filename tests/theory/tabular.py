"""Token MDPs small enough to be enumerated, with a softmax policy that has its own logits after every prefix.

Every expectation over completions is a finite sum, so "unbiased" can be checked to float64 rounding; where an
experiment draws samples all the same, its test states the confidence.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import GlobalCounts, aggregation_weights, weighted_sum


class TokenMDP:
    """Completions of `length` tokens out of `vocab_size`, one reward each."""

    def __init__(self, vocab_size: int, length: int, rewards: Callable[[tuple[int, ...]], float]) -> None:
        self.vocab_size, self.length = vocab_size, length
        self.completions = list(itertools.product(range(vocab_size), repeat=length))
        prefixes = [p for n in range(length) for p in itertools.product(range(vocab_size), repeat=n)]
        number = {prefix: i for i, prefix in enumerate(prefixes)}
        self.num_states = len(prefixes)
        self.tokens = torch.tensor(self.completions)
        """[C, L]."""
        self.states = torch.tensor([[number[c[:n]] for n in range(length)] for c in self.completions])
        """[C, L]: row of the logits from which each token is drawn."""
        self.rewards = torch.tensor([rewards(c) for c in self.completions], dtype=torch.float64)

    def logits(self, seed: int | None = None, scale: float = 1.0) -> Tensor:
        """[states, V] logits of a policy: random, or all 0."""
        shape = (self.num_states, self.vocab_size)
        if seed is None:
            return torch.zeros(shape, dtype=torch.float64)
        return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def token_log_probs(self, logits: Tensor, which: Tensor | None = None) -> Tensor:
        """[N, L]: log-probs of the tokens of completions `which`, by default of all."""
        states, tokens = (self.states, self.tokens) if which is None else (self.states[which], self.tokens[which])
        return logits.log_softmax(1)[states, tokens]

    def probabilities(self, logits: Tensor) -> Tensor:
        """[C]: of each completion."""
        return self.token_log_probs(logits).sum(1).exp()

    def value(self, logits: Tensor) -> Tensor:
        """E[reward], exactly."""
        return (self.probabilities(logits) * self.rewards).sum()

    def gradient(self, logits: Tensor) -> Tensor:
        """d E[reward] / d logits, exactly."""
        return gradient_of(self.value, logits)

    def state_values(self, logits: Tensor) -> Tensor:
        """[states]: expected reward from each prefix on, exactly."""
        p = self.probabilities(logits.detach())
        values = torch.zeros(self.num_states, dtype=torch.float64)
        mass = values.clone()
        for n in range(self.length):
            values.index_add_(0, self.states[:, n], p * self.rewards)
            mass.index_add_(0, self.states[:, n], p)
        return values / mass

    def sample(self, logits: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """[count] int64: completions drawn from the policy, by number."""
        return torch.multinomial(self.probabilities(logits.detach()), count, replacement=True, generator=generator)


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """d function / d at, at a copy that carries the gradient."""
    at = at.detach().clone().requires_grad_()
    function(at).backward()
    assert at.grad is not None
    return at.grad


def minimum(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a smooth function is least, by L-BFGS in float64."""
    at = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [at], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = function(at)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
    return at.detach()


def packed(num_sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """loss_mask and cu_seqlens of a row of equally long sequences without prompts."""
    cu_seqlens = torch.arange(0, (num_sequences + 1) * length, length, dtype=torch.int32)
    return torch.ones(num_sequences * length, dtype=torch.float64), cu_seqlens


def mean_loss(losses: Tensor, length: int, mode: str = "sequence_mean_token_sum") -> Tensor:
    """The loss of a batch of equally long sequences from its per-token losses [N L]."""
    mask, cu_seqlens = packed(len(losses) // length, length)
    counts = GlobalCounts(num_tokens=float(len(losses)), num_sequences=len(losses) / length)
    weights = aggregation_weights(mask, cu_seqlens, mode=mode, counts=counts, token_sum_norm=None)
    return weighted_sum(losses, weights)
