"""Every preset of configs/algorithms trains: real runs of two steps, with a model of 2 layers on one rank.

What an algorithm computes is tested where it is written; here its parts are put together as a recipe puts them.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.e2e.runs import Run, repeatable

PRESETS = Path(__file__).parents[2] / "configs" / "algorithms"
ONLINE = ["a2c", "cispo", "dapo", "dr_grpo", "exact_distillation", "grpo", "gspo", "gspo_token"]
ONLINE += ["on_policy_distillation", "opo", "ppo", "ppo_shared", "ppo_trajectory", "reinforce"]
ONLINE += ["reinforce_baseline", "reinforce_batch_norm", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo"]
WITH_CRITIC = ("a2c", "gspo_token", "ppo", "ppo_shared")
OF_PAIRS = ["dpo", "ipo", "orpo", "simpo", "slic"]
OF_SINGLE = ["kto"]
REWARD_MODELS = ["process_reward_model", "reward_model", "reward_regression"]
SUPERVISED = ["distillation", "focal", "label_smoothing"]
PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(12)]
SINGLE = [{"prompt": f"{i}+{i}=", "response": str(2 * i + i % 2), "label": i % 2 == 0} for i in range(12)]
STEPS = [{"prompt": f"{i}+{i}=", "response": [str(i), "0"], "label": [True, False]} for i in range(12)]


def run_of(folder: Path, preset: str, recipe: str = "rl", **sections: dict[str, Any]) -> Run:
    """The tests' run on one rank, two steps of it, with a preset in the place of its algorithm."""
    run = Run(
        folder,
        **{
            "parallel": {"tensor_model_parallel_size": 1},
            "train": {"num_steps": 2, "global_batch_size": 12},
            "checkpoint": {"save_interval": 0},
            "evaluation": {"interval": 0},
            "optimizer": {"lr_warmup_steps": 0},
            **sections,
        },
    )
    file = folder / "run.yaml"
    config = json.loads(file.read_text())
    own = sections.get("algorithm", {})
    if "distillation" in preset:
        own = {"kl": {"reference_path": "teacher"}}
        run.write_teacher()
    config |= {"base": [str(PRESETS / f"{preset}.yaml")], "recipe": recipe, "algorithm": own}
    file.write_text(json.dumps(config))
    return run


def preference_run(
    folder: Path, preset: str, recipe: str, rows: list[dict[str, Any]], *, global_batch_size: int = 4
) -> Run:
    data = {"train": "judged.jsonl", "eval": "judged.jsonl"}
    train = {"num_steps": 2, "global_batch_size": global_batch_size}
    run = run_of(folder, preset, recipe, data=data, train=train)
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_every_preset_is_tested() -> None:
    assert sorted([*ONLINE, *OF_PAIRS, *OF_SINGLE, *REWARD_MODELS, *SUPERVISED]) == sorted(
        file.stem for file in PRESETS.iterdir()
    )


@pytest.mark.parametrize(
    "preset", [name if name == "ppo" else pytest.param(name, marks=pytest.mark.slow) for name in ONLINE]
)
def test_a_policy_gradient_algorithm_trains(preset: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, preset).train_forked()
    last = run.rows[-1]
    assert last["step"] == 2
    assert math.isfinite(last["policy/loss"])
    assert last["optim/grad_norm"] > 0
    assert ("value/loss" in last) == (preset in WITH_CRITIC)
    assert ("policy/kl_ref" in last) == ("  coefficient: 0.0\n" not in (PRESETS / f"{preset}.yaml").read_text())
    if "distillation" in preset:
        assert last["policy/kl_ref"] > 0.01  # another model than the student
    assert ("sampling/rounds" in last) == (preset == "dapo")


@pytest.mark.parametrize(
    "preset", [name if name == "dpo" else pytest.param(name, marks=pytest.mark.slow) for name in OF_PAIRS]
)
def test_a_policy_trains_on_pairs(preset: str, tmp_path: Path) -> None:
    run = preference_run(tmp_path, preset, "preference", PAIRS).train_forked()
    first, last = run.rows[0], run.rows[-1]
    assert last["eval/heldout/loss"] < first["eval/heldout/loss"]
    if preset == "dpo":
        assert first["eval/heldout/loss"] == pytest.approx(math.log(2), abs=1e-5)  # pi = ref
    assert last["eval/heldout/pair_accuracy"] > 0.5


@pytest.mark.slow
def test_a_policy_trains_on_single_completions(tmp_path: Path) -> None:
    run = preference_run(tmp_path, "kto", "preference", SINGLE, global_batch_size=len(SINGLE)).train_forked()
    assert run.rows[-1]["eval/heldout/loss"] < run.rows[0]["eval/heldout/loss"]
    # The second step sees what the first did to the same rows.
    assert run.rows[-1]["preference/chosen_reward"] > run.rows[-1]["preference/rejected_reward"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "rows", "kind"),
    [
        ("reward_model", PAIRS, AutoModelForSequenceClassification),
        ("reward_regression", SINGLE, AutoModelForSequenceClassification),
        ("process_reward_model", STEPS, AutoModelForTokenClassification),
    ],
)
def test_a_reward_model_trains_and_then_drives_a_policy(
    preset: str, rows: list[dict[str, Any]], kind: Any, tmp_path: Path
) -> None:
    trained = preference_run(tmp_path / "reward", preset, "reward_model", rows).train_forked()
    assert trained.rows[-1]["eval/heldout/loss"] < trained.rows[0]["eval/heldout/loss"]
    assert kind.from_pretrained(trained.directory.hf_dir).num_labels == 1
    learned = {"hf_path": str(trained.directory.hf_dir)}
    if preset == "process_reward_model":
        learned |= {"kind": "process", "step_separator": "", "credit": "progress"}
    functions = [{"name": "exact_match", "weight": 0.0}]
    run = run_of(tmp_path / "policy", "ppo", rewards={"functions": functions, "model": learned}).train_forked()
    last = run.rows[-1]
    assert last["reward/mean"] == pytest.approx(last["reward/model"], abs=1e-5)  # the other has weight 0
    assert last["reward/std"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", SUPERVISED)
def test_supervised_training(preset: str, tmp_path: Path) -> None:
    run = preference_run(tmp_path, preset, "sft", [row | {"label": 1} for row in SINGLE]).train_forked()
    assert 0 < run.rows[-1]["sft/loss"] < 10
    assert run.rows[-1]["optim/grad_norm"] > 0
    if preset == "distillation":
        assert run.rows[-1]["sft/loss"] == pytest.approx(run.rows[-1]["policy/kl_ref"], rel=1e-5)
        assert run.rows[-1]["policy/kl_ref"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ppo", "ppo_shared"])
def test_critic_adaptive_kl_and_moving_reference_resume(preset: str, tmp_path: Path) -> None:
    """Set back to step 2 and made again, steps 3 and 4 are those of the first time, bit for bit."""
    kl = {"target": 0.01, "horizon": 24, "reference": "moving_average", "moving_average_decay": 0.5}
    train = {"num_steps": 4, "global_batch_size": 12}
    run = run_of(tmp_path, preset, train=train, checkpoint={"save_interval": 2}, algorithm={"kl": kl}).train_forked()
    first, weights = repeatable(run.rows), run.exported_bytes
    assert len({row["policy/kl_coefficient"] for row in first if "policy/kl_coefficient" in row}) == 4
    shutil.rmtree(run.directory.checkpoints_dir / "iter_0000004")
    (run.directory.checkpoints_dir / "latest_checkpointed_iteration.txt").write_text("2\n")
    run.train_forked()
    assert repeatable(run.rows) == first
    assert run.exported_bytes == weights
