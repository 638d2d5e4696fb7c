"""Whole runs through the real command line: what they leave behind, and that their numbers are what they promise.

A run takes 15 to 20 seconds, nearly all of it to start, so the tests share four of them.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.config.load import load_config
from megatron_rl.data.datasets import DataOrder
from megatron_rl.runs.logs import read_rollouts, rollout_steps
from tests.e2e.runs import CONFIG, NUM_PROMPTS, NUM_SAMPLES, NUM_STEPS, Run, reference

EVERY_STEP = {
    *("reward/mean", "reward/std", "reward/min", "reward/max", "reward/run_rewards:digits", "reward/exact_match"),
    *("response/length_mean", "response/truncated_fraction"),
    *("policy/loss", "policy/entropy", "policy/kl_ref", "policy/approx_kl", "policy/ratio_max", "policy/ratio_min"),
    *("policy/clip_fraction", "policy/clip_fraction_low", "policy/clip_fraction_high", "policy/clip_fraction_dual"),
    *("mismatch/log_prob_abs_diff_mean", "mismatch/log_prob_abs_diff_max", "mismatch/token_mult_prob_error"),
    *("mismatch/kl", "optim/grad_norm", "optim/lr", "optim/skipped_updates"),
    *(f"timing_s/{phase}" for phase in ("generate", "score", "advantages", "log_probs", "train", "sync_weights")),
    *("timing_s/step", "throughput/tokens", "throughput/tokens_per_second", "throughput/tokens_per_second_per_gpu"),
    *("sync/version", "sync/bytes", "sync/seconds", "data/packing_efficiency", "data/imbalance"),
    *("staleness/mean", "staleness/max"),
    *(f"importance/{name}" for name in ("ratio_mean", "ratio_min", "ratio_max", "effective_sample_size")),
    *("importance/above_fraction", "importance/below_fraction", "policy/change_mean", "policy/change_max"),
    *("policy/loss_policy", "policy/loss_kl", "policy/loss_entropy", "policy/kl_coefficient"),
    *("convergence/loss_variance", "convergence/converged"),
}
EVALUATION = {
    *(f"eval/heldout/{name}" for name in ("accuracy", "reward_mean", "response_length_mean", "truncated_fraction")),
    *("eval/heldout/reward/run_rewards:digits", "eval/heldout/reward/exact_match"),
}


def steps(run: Run) -> list[dict[str, float]]:
    """The rows of steps 1, 2, ..."""
    return run.rows[1:]


@pytest.fixture(scope="module")
def two_updates(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two replicas with an engine each, two updates per step, the KL penalty in the reward."""
    return Run(
        tmp_path_factory.mktemp("two_updates"),
        parallel={"tensor_model_parallel_size": 1, "data_parallel_size": 2},
        train={"num_steps": 2, "global_batch_size": NUM_PROMPTS * NUM_SAMPLES // 2},
        algorithm={"kl": {"coefficient": 0.05, "place": "reward", "estimator": "k1"}},
    ).train_forked()


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two replicas that share one engine; else the first step of the reference."""
    return Run(
        tmp_path_factory.mktemp("shared_engine"),
        parallel={"tensor_model_parallel_size": 1, "data_parallel_size": 2},
        rollout={"tensor_model_parallel_size": 2},
        **one_step(),
    ).train_forked()


def one_step() -> dict[str, dict[str, object]]:
    """Sections that end a run after its first step, which is that of the whole run."""
    return {
        "train": {"num_steps": 1},
        "optimizer": {"lr_decay_steps": NUM_STEPS},
        "checkpoint": {"save_interval": 0, "export_hf": False},
    }


# ---- what a run leaves behind


def test_rows_have_the_names_that_others_rely_on() -> None:
    rows = reference().rows
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert rows[0].keys() == {"step", *EVALUATION}
    for row in rows[1:]:
        # evaluation.interval is 2; the last step is evaluated too, and it is a multiple of 2.
        evaluated = {"timing_s/evaluate", *EVALUATION} if row["step"] % 2 == 0 else set()
        assert row.keys() == {"step", *EVERY_STEP, *evaluated}
        assert all(math.isfinite(value) for value in row.values())


def test_files_of_the_run_directory() -> None:
    directory = reference().directory
    assert load_config(directory.config_file).rollout.num_prompts_per_step == NUM_PROMPTS
    assert sorted(path.name for path in directory.checkpoints_dir.iterdir()) == [
        "iter_0000002",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
    ]
    assert (directory.checkpoints_dir / "latest_checkpointed_iteration.txt").read_text() == "4\n"
    assert rollout_steps(directory) == [1, 2, 3, 4]
    assert list(directory.tensorboard_dir.glob("events.*"))
    assert sorted(path.name for path in directory.logs_dir.iterdir()) == ["rank_1.log", "ranks", "versions.json"]
    assert "<svg" in directory.report_file.read_text()


def test_the_libraries_are_quiet() -> None:
    """What rank 1 says goes to its log. A run in which nothing is wrong has nothing to say."""
    assert (reference().directory.logs_dir / "rank_1.log").read_text() == ""


def test_every_rollout_was_made_by_the_weights_of_the_step_before() -> None:
    drawn = DataOrder(100, seed=CONFIG["seed"], shuffle=True)
    for step in range(1, NUM_STEPS + 1):
        records = read_rollouts(reference().directory, step)
        assert len(records) == CONFIG["logging"]["num_logged_rollouts"]
        prompts = drawn.rows((step - 1) * NUM_PROMPTS, NUM_PROMPTS)
        for record in records:
            assert record["weight_version"] == record["step"] - 1 == step - 1
            assert record["prompt_id"] in prompts
            assert record["source"] == f"train.jsonl:{record['prompt_id'] + 1}"
            total = record["reward_terms"]["run_rewards:digits"] + 0.5 * record["reward_terms"]["exact_match"]
            assert record["reward"] == total


def test_the_export_is_a_checkpoint_for_others() -> None:
    folder = reference().directory.hf_dir
    start, trained = (load_file(f / "model.safetensors") for f in (reference().folder / "model", folder))
    assert start.keys() == trained.keys()
    assert all((start[name] != trained[name]).any() for name in start)
    ids = AutoTokenizer.from_pretrained(folder)("12+7=", return_tensors="pt").input_ids
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert logits.shape == (1, 5, 17)
    assert torch.isfinite(logits).all()


# ---- what its numbers promise


@pytest.mark.parametrize("name", ["reference", "two_updates", "shared_engine"])
def test_the_engine_samples_from_the_policy_that_is_trained(name: str, request: pytest.FixtureRequest) -> None:
    run = reference() if name == "reference" else request.getfixturevalue(name)
    for row in steps(run):
        # The promise for float32. Two implementations of one model round differently, at about 1e-7 per log-prob here.
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-3
        assert row["mismatch/log_prob_abs_diff_mean"] < 1e-5
        assert row["sync/version"] == row["step"]
        assert row["staleness/max"] == 0


def test_one_update_per_step_is_exactly_on_policy() -> None:
    for row in steps(reference()):
        assert row["policy/approx_kl"] < 1e-8
        assert row["policy/ratio_max"] == row["policy/ratio_min"] == 1.0
        assert row["policy/clip_fraction"] == 0.0


def test_the_policy_starts_at_the_reference_and_leaves_it() -> None:
    first, *later = (row["policy/kl_ref"] for row in steps(reference()))
    assert first == 0.0
    assert min(later) > 1e-4


def test_the_learning_rate_decays_over_the_run() -> None:
    # Linear from 1e-3 to 0 in 4 updates; update i uses the rate after i updates.
    assert [row["optim/lr"] for row in steps(reference())] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_second_update_leaves_the_old_policy(two_updates: Run) -> None:
    for row in steps(two_updates):
        # The first update's tokens have ratio 1 up to rounding, the second's do not.
        assert row["policy/ratio_max"] > 1.001
        assert row["policy/ratio_min"] < 0.999
        assert row["policy/approx_kl"] > 1e-6
    # Linear from 1e-3 to 0 over 2 steps of 2 updates; the row shows the largest of its step.
    assert [row["optim/lr"] for row in steps(two_updates)] == pytest.approx([1e-3, 5e-4])


def test_samples_do_not_depend_on_the_layout(two_updates: Run, shared_engine: Run) -> None:
    """Engines of one rank or two, two or one of them: the same completions, token by token."""
    completions = [
        [(record["prompt"], record["completion"], record["reward"]) for record in read_rollouts(run.directory, 1)]
        for run in (reference(), two_updates, shared_engine)
    ]
    assert completions[0] == completions[1] == completions[2]


def test_the_first_step_does_not_depend_on_the_layout(shared_engine: Run) -> None:
    assert_equal_first_step(shared_engine)


@pytest.mark.slow
def test_the_first_step_of_a_pipeline(tmp_path: Path) -> None:
    parallel = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}
    assert_equal_first_step(Run(tmp_path, parallel=parallel, **one_step()).train_forked())


def assert_equal_first_step(run: Run) -> None:
    same = [name for name in EVERY_STEP if name.startswith(("reward/", "response/", "policy/", "optim/"))]
    expected, row = steps(reference())[0], steps(run)[0]
    # Sums are made in another order: float32 rounds at 6e-8, a gradient's norm adds up some 1e5 products of such.
    assert {name: row[name] for name in same} == pytest.approx({n: expected[n] for n in same}, rel=1e-5, abs=1e-7)


# ---- user's mistakes that only a rank can find


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        pytest.param("raises", "raised RuntimeError: no verdict (run_rewards.py:"),
        pytest.param("nan", "returned nan (float), not a finite number", marks=pytest.mark.slow),
    ],
)
def test_a_reward_that_fails_names_the_sample(fails: str, said: str, tmp_path: Path) -> None:
    """In rank 1, whose terminal nobody sees, after two steps. Their record is kept."""
    run = Run(tmp_path)
    ended = run.finish(RUN_FAILS=fails)
    assert ended.code == 2
    assert ended.last_line.startswith("megatron-rl: error: reward 'run_rewards:digits' " + said)
    assert "; sample train.jsonl:" in ended.last_line
    assert "Traceback" not in ended.stderr
    assert [row["step"] for row in run.rows] == [0, 1, 2]


# ---- evaluate


def test_an_evaluation_reads_the_latest_checkpoint_and_writes_nothing(tmp_path: Path) -> None:
    shutil.copytree(reference().folder, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path)
    with run.directory.metrics_file.open("a") as file:  # the run still goes on, beyond its checkpoint
        file.write('{"step": 5}\n')
    before = {path: path.read_bytes() for path in run.directory.path.rglob("*") if path.is_file()}
    ended = run.finish("evaluate")
    assert ended.code == 0, ended.stderr[-4000:]
    # Engines of the same size decode the same batch with the same weights, so the numbers are equal, not close.
    assert json.loads(ended.stdout) == {name: steps(reference())[-1][name] for name in EVALUATION}
    logs = run.directory.logs_dir
    after = {path: path.read_bytes() for path in run.directory.path.rglob("*") if path.is_file()}
    assert {p: b for p, b in after.items() if p.parent != logs} == {p: b for p, b in before.items() if p.parent != logs}
