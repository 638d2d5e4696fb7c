"""What the clip does for the trust region, at equal learning rates, and what it does not do."""

import torch

from megatron_rl.algorithms.kl import exact_kl
from tests.theory.learning import ALGORITHMS, update
from tests.theory.tabular import TokenMDP

MDP = TokenMDP(4, 3, lambda c: float(sum(c)) / 9 + float(c == (3, 3, 3)))
SEEDS = 10


def moved(name: str, *, lr: float, epochs: int = 16) -> tuple[float, float, float]:
    """After the updates of one rollout, from equal starts: tokens with a ratio outside [0.8, 1.2], exact KL(old || new)
    of completions, and the largest ratio; the first two are means over the starts."""
    outside, kl, largest = 0.0, 0.0, 0.0
    for seed in range(SEEDS):
        start = MDP.logits(seed)
        logits, values = start.clone().requires_grad_(), MDP.state_values(start).requires_grad_()
        optimizer = torch.optim.SGD([{"params": [logits], "lr": lr}, {"params": [values], "lr": 1.0}])
        learner, generator = ALGORITHMS[name](), torch.Generator().manual_seed(seed)
        learner.epochs = epochs
        old, new = update(MDP, learner, logits, values, optimizer, generator, batch=256)
        ratio = (new - old).exp()
        outside += float(((ratio < 0.8) | (ratio > 1.2)).double().mean()) / SEEDS
        largest = max(largest, float(ratio.max()))
        p_old, p_new = MDP.token_log_probs(start).sum(1), MDP.token_log_probs(logits).detach().sum(1)
        kl += float(exact_kl(p_old, p_new)) / SEEDS
    return outside, kl, largest


def test_the_clip_keeps_ppo_and_grpo_nearer_than_unclipped_a2c() -> None:
    a2c_outside, a2c_kl, a2c_largest = moved("a2c_unclipped", lr=1.0)
    for name in ("ppo", "grpo"):
        outside, kl, largest = moved(name, lr=1.0)
        assert outside < 0.8 * a2c_outside, name
        assert kl < 0.2 * a2c_kl, name
        assert largest < 0.6 * a2c_largest, name


def test_the_clip_does_not_bound_the_ratio() -> None:
    # A third of the tokens end outside [0.8, 1.2] although every update was clipped: a step overshoots, and nothing
    # pulls back. Larger steps overshoot further.
    for name in ("ppo", "grpo"):
        near, far = moved(name, lr=1.0), moved(name, lr=10.0)
        assert near[0] > 0.25
        assert near[2] > 1.3
        assert far[2] > 1.2 * near[2]
