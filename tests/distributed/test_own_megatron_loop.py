"""The program of docs/own_megatron_loop.md, plain Megatron-Core, trains as `megatron-rl train` does."""

import json
import math
from pathlib import Path

import pytest

from tests.distributed.own_loop import run_in_rank, source
from tests.distributed.spawn import run_ranks
from tests.e2e.runs import Run

NUM_STEPS, UPDATES, NUM_PROMPTS, NUM_SAMPLES = 3, 2, 6, 4
# The contract's: sums over tokens are made in another order, and Adam carries the rounding on.
RELATIVE = 1e-5
# float32, as in weight_sync_ranks.py.
LOG_PROB_TOLERANCE = 5e-5

# The run's own record has text; what is trained on are token ids, which this reward module adds to it.
RECORDS_TOKEN_IDS = """
from megatron_rl.trainer import rollouts

without_ids = rollouts._record


def with_ids(sample, advantage, step):
    prompt, completion = sample.prompt, sample.completion
    ids = {"prompt_token_ids": prompt.token_ids, "token_ids": completion.token_ids}
    return without_ids(sample, advantage, step) | ids


rollouts._record = with_ids
"""

CONFIG = {
    "parallel": {"tensor_model_parallel_size": 1},
    "optimizer": {"lr_decay_style": "constant", "weight_decay": 0.0},
    "algorithm": {"kl": {"coefficient": 0.0}, "entropy_coefficient": 0.0},
    "train": {"num_steps": NUM_STEPS, "global_batch_size": NUM_PROMPTS * NUM_SAMPLES // UPDATES},
    "logging": {"num_logged_rollouts": NUM_PROMPTS * NUM_SAMPLES},
    "data": {"eval": None},
    "evaluation": {"interval": 0},
    "checkpoint": {"save_interval": 0, "export_hf": False},
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("recorded"), **CONFIG)
    with (run.folder / "run_rewards.py").open("a") as file:
        file.write(RECORDS_TOKEN_IDS)
    return run.succeed()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("program") / "own_megatron_loop.py"
    file.write_text(source())
    return file


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        pytest.param(2, ["--tensor=2", "--engine"], id="tp2"),
        pytest.param(2, ["--pipeline=2"], id="pp2"),
        pytest.param(2, ["--context=2"], id="cp2"),
        pytest.param(4, ["--tensor=2"], id="tp2_dp2"),
    ],
)
def test_losses_and_gradient_norms_are_those_of_a_run(
    recorded: Run, program: Path, num_ranks: int, layout: list[str]
) -> None:
    folders = [f"--model={recorded.folder / 'model'}", f"--rollouts={recorded.directory.rollouts_dir}"]
    results = run_ranks(run_in_rank, num_ranks, program, [*folders, f"--updates={UPDATES}", *layout], timeout_s=300)
    steps = recorded.rows[-NUM_STEPS:]
    for updates, differences in results:
        assert len(updates) == NUM_STEPS * UPDATES
        for step, row in enumerate(steps):
            losses, norms = zip(*updates[step * UPDATES : (step + 1) * UPDATES], strict=True)
            # A row of metrics has the mean loss of its updates and the largest gradient norm.
            assert sum(losses) / UPDATES == pytest.approx(row["policy/loss"], rel=RELATIVE, abs=1e-7), f"step {step}"
            assert max(norms) == pytest.approx(row["optim/grad_norm"], rel=RELATIVE), f"step {step}"
        if "--engine" in layout:
            before, after = differences
            assert before > 100 * LOG_PROB_TOLERANCE  # the engine started with the weights before training
            assert after < LOG_PROB_TOLERANCE


def test_the_recorded_run_is_worth_comparing_with(recorded: Run) -> None:
    """Its second updates leave the old policy, and its losses and norms move."""
    steps = recorded.rows[-NUM_STEPS:]
    assert all(row["policy/ratio_max"] > 1.001 for row in steps)
    assert all(not math.isclose(row["policy/loss"], 0.0, abs_tol=1e-5) for row in steps)
    assert len({row["optim/grad_norm"] for row in steps}) == NUM_STEPS
    lines = (recorded.directory.rollouts_dir / "step_0000001.jsonl").read_text().splitlines()
    assert len([json.loads(line)["token_ids"] for line in lines]) == NUM_PROMPTS * NUM_SAMPLES
