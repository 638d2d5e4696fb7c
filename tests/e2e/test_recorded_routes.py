"""A whole run of a model with experts whose training follows the routes that its engines recorded."""

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.runs import NUM_PROMPTS, NUM_SAMPLES, Run

# Nats; the same routes, and float32 on both sides, whose sums differ in their order. See test_rollout_engine.py.
LARGEST_MISMATCH = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [{"expert_model_parallel_size": 2, "data_parallel_size": 2}, {"context_parallel_size": 2}],
    ids=["ep2", "cp2"],
)
def test_a_run_follows_them(tmp_path: Path, parallel: dict[str, int]) -> None:
    run = Run(
        tmp_path / "run",
        model={"moe_routing_replay": True},
        parallel={"tensor_model_parallel_size": 1, **parallel},
        rollout={"record_routes": True},
        data={"max_prompt_tokens": 64},
        train={"num_steps": 2, "global_batch_size": NUM_PROMPTS * NUM_SAMPLES // 2},
    )
    shutil.rmtree(run.folder / "model")
    make_checkpoint(run.folder / "model", "qwen3_moe", seed=3, hidden_size=64)
    rows = run.train_forked().rows[1:]
    assert len(rows) == 2
    assert all(row["mismatch/log_prob_abs_diff_max"] < LARGEST_MISMATCH for row in rows)
    assert all(row["optim/skipped_updates"] == 0 for row in rows)
