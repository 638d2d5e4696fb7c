"""Notes of a reward: kept by the pool, logged with the sample, counted as metrics."""

import pytest
import torch

from megatron_rl.config.schema import RewardFunctionConfig, RewardsConfig
from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.scoring import resolve_rewards, score
from megatron_rl.trainer.rollouts import sample_metrics, sample_records

NAME = "tests.unit.rewards.verifiers:noted"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_notes_reach_the_log_and_the_metrics(num_workers: int) -> None:
    rewards = resolve_rewards(RewardsConfig([RewardFunctionConfig(NAME)]))
    pool = RewardPool(num_workers=1, timeout_s=60.0, memory_bytes=0) if num_workers else None
    completions = [Completion((1,), (0.0,), text, "stop", 0) for text in ("same", "same", "different", "same")]
    try:
        samples = score([Prompt(0, (1,), "p", None, "f:1")] * 4, completions, rewards, pool=pool)
    finally:
        if pool is not None:
            pool.close()
    metrics = sample_metrics(samples, version=0)
    shares = {name: metrics[f"reward/{NAME}/{name}"] for name in ("same", "different", "unknown")}
    assert shares == {"same": 0.75, "different": 0.25, "unknown": 0.0}
    records = sample_records(samples, torch.zeros(4), step=0, count=4)
    assert records[2]["notes"] == {NAME: {"verdict": "different"}}
