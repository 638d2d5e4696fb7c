"""Choices of an algorithm that contradict each other, and further checkpoints that are not what they must be."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.config.algorithm import check_algorithm, check_checkpoints
from megatron_rl.config.errors import ConfigError
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config

NEEDED = ("name=run", "model.hf_path=m", "data.train=t.jsonl", "rewards.functions=[{name: exact_match}]")


def configured(folder: Path, keys: Sequence[str]) -> Config:
    file = folder / "empty.yaml"
    file.write_text("")
    return load_config(file, [*NEEDED, *keys])


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("rollout.num_samples_per_prompt=1", "algorithm.advantage.estimator=gae"),
        ("algorithm.correction.low=3",),  # metrics only
        ("algorithm.kl.target=0.1", "algorithm.kl.horizon=128"),  # 16 x 8 samples
        ("rewards.overlong.buffer_tokens=256",),
        ("rewards.model.kind=process", "rewards.model.credit=progress"),
        ("algorithm.critic.shared=true", "algorithm.critic.optimizer.lr=1e-3"),
        ("algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=exact"),
        (
            "recipe=sft",
            "algorithm.kl.coefficient=1",
            "algorithm.kl.estimator=exact",
            "algorithm.supervised.coefficient=0",
        ),
    ],
)
def test_what_is_sound_passes(keys: Sequence[str], tmp_path: Path) -> None:
    check_algorithm(configured(tmp_path, keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ("rollout.num_samples_per_prompt=1",),
            "rollout.num_samples_per_prompt: given 1, allowed: [2, inf): alone in its group, a sample has advantage 0",
        ),
        (
            (
                "rollout.num_samples_per_prompt=1",
                "algorithm.advantage.estimator=gae",
                "algorithm.dynamic_sampling.max_rounds=2",
            ),
            "algorithm.dynamic_sampling.max_rounds: given 2, allowed: 1 with rollout.num_samples_per_prompt=1: "
            "a sample alone has nothing to differ from",
        ),
        (
            ("algorithm.correction.method=mask", "algorithm.correction.low=3"),
            "algorithm.correction.low: given 3.0, allowed: less than algorithm.correction.high 2.0",
        ),
        (
            ("algorithm.kl.target=0.1", "algorithm.kl.horizon=127"),
            "algorithm.kl.horizon: given 127, allowed: at least 128, the samples of a step, with a target",
        ),
        (
            ("algorithm.kl.reference_path=x", "algorithm.kl.reference=refreshed"),
            "algorithm.kl.reference: given 'refreshed', allowed: fixed with algorithm.kl.reference_path",
        ),
        (
            ("rewards.model.credit=spread",),
            "rewards.model.credit: given 'spread', allowed: step_end with rewards.model.kind=outcome: it has no steps",
        ),
        (
            ("rewards.overlong.buffer_tokens=257",),
            "rewards.overlong.buffer_tokens: given 257, allowed: at most 256, rollout.sampling.max_response_tokens",
        ),
        (
            ("algorithm.critic.shared=true", "algorithm.critic.warmup_steps=2"),
            "algorithm.critic.warmup_steps: given 2, allowed: 0 with algorithm.critic.shared",
        ),
        (
            ("algorithm.critic.shared=true", "algorithm.critic.hf_path=x"),
            "algorithm.critic.hf_path: given 'x', allowed: null with algorithm.critic.shared",
        ),
        (
            ("algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=exact", "algorithm.kl.place=reward"),
            "algorithm.kl.place: given 'reward', allowed: loss with algorithm.kl.estimator=exact",
        ),
        (
            ("algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=exact", "algorithm.kl.weighted=true"),
            "algorithm.kl.weighted: given True, allowed: false with algorithm.kl.estimator=exact: no samples",
        ),
        (
            ("algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=exact", "algorithm.policy_loss.name=gspo"),
            "algorithm.policy_loss.name: given 'gspo', allowed: a built-in loss of tokens with "
            "algorithm.kl.estimator=exact",
        ),
        (
            ("algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=exact", "algorithm.critic.shared=true"),
            "algorithm.critic.shared: given True, allowed: false with algorithm.kl.estimator=exact",
        ),
        (
            ("recipe=sft", "algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=exact", "algorithm.kl.place=reward"),
            "algorithm.kl.place: given 'reward', allowed: loss with algorithm.kl.estimator=exact",
        ),
        (
            ("recipe=sft", "algorithm.kl.coefficient=0.1"),
            "algorithm.kl.estimator: given 'k3', allowed: exact with recipe sft and a coefficient",
        ),
        (
            ("recipe=sft", "algorithm.kl.coefficient=0.1", "algorithm.kl.estimator=exact", "algorithm.kl.target=1"),
            "algorithm.kl.target: given 1.0, allowed: null with recipe sft",
        ),
        (
            ("recipe=sft", "algorithm.supervised.coefficient=0"),
            "algorithm.supervised.coefficient: given 0.0, allowed: more than 0 with algorithm.kl.coefficient 0",
        ),
    ],
)
def test_what_contradicts_is_refused(keys: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_algorithm(configured(tmp_path, keys))
    assert str(caught.value) == message


def checkpoint(folder: Path, architecture: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    save_file({"score.weight": torch.zeros(1, 2)}, folder / "model.safetensors")
    return folder


def test_a_reward_model_is_a_classifier_of_its_kind(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "rm", "Qwen3ForSequenceClassification")
    check_checkpoints(configured(tmp_path, [f"rewards.model.hf_path={folder}"]))
    with pytest.raises(ConfigError, match=r"rewards\.model\.hf_path: given 'architecture .* ForTokenClassification"):
        check_checkpoints(configured(tmp_path, [f"rewards.model.hf_path={folder}", "rewards.model.kind=process"]))
    with pytest.raises(ConfigError, match=r"algorithm\.kl\.reference_path: given 'architecture"):
        check_checkpoints(configured(tmp_path, [f"algorithm.kl.reference_path={folder}"]))


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.critic\.hf_path: given 'nowhere', allowed: a Hugging Face"):
        check_checkpoints(configured(tmp_path, ["algorithm.critic.hf_path=nowhere"]))
