"""Each named algorithm solves a bandit and a token MDP whose reward comes at the end of one completion in 27."""

import pytest
import torch

from tests.theory.learning import ALGORITHMS, update
from tests.theory.tabular import TokenMDP

BANDIT = TokenMDP(5, 1, lambda c: (0.1, 0.2, 0.3, 1.0, 0.5)[c[0]])
SPARSE = TokenMDP(3, 3, lambda c: float(c == (2, 0, 1)))


def train(mdp: TokenMDP, name: str, *, steps: int, lr: float, sign: float = 1.0) -> float:
    """The exact expected reward at the end; sign -1 plants the bug of ascending where one should descend."""
    logits, values = mdp.logits().requires_grad_(), torch.zeros(mdp.num_states, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [logits], "lr": lr, "maximize": sign < 0}, {"params": [values], "lr": 0.1}]
    )
    learner, generator = ALGORITHMS[name](), torch.Generator().manual_seed(0)
    for _ in range(steps):
        update(mdp, learner, logits, values, optimizer, generator, batch=64)
    return float(mdp.value(logits).detach())


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_bandit_is_solved(name: str) -> None:
    # Uniform, the policy earns 0.42; the best arm pays 1, the next 0.5: 0.9 needs the best arm nine times in ten.
    assert train(BANDIT, name, steps=60, lr=0.1) > 0.9


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_sparse_terminal_reward_is_found(name: str) -> None:
    # Uniform, the policy earns 1/27.
    assert train(SPARSE, name, steps=60, lr=0.2) > 0.9


def test_a_wrong_sign_is_seen() -> None:
    assert train(BANDIT, "grpo", steps=60, lr=0.1, sign=-1.0) < 0.42
