"""The example of docs/algorithms.md works as it stands: a loss, an estimator and a reward by dotted path."""

import re
from pathlib import Path

import pytest
import torch

from megatron_rl.algorithms.aggregation import GlobalCounts
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.data.packing import pack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.objectives.advantages import resolve_estimator
from megatron_rl.objectives.losses import resolve_policy_loss
from megatron_rl.objectives.objectives import PolicyGradientObjective
from megatron_rl.rewards.scoring import resolve_rewards

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The quickstart's configuration with the document's on top; its module lies in the current folder."""
    text = (REPOSITORY / "docs" / "algorithms.md").read_text()
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_algorithms.py").write_text(python)
    (tmp_path / "mine.yaml").write_text(f"base: {REPOSITORY}/configs/recipes/quickstart_grpo.yaml\n{yaml}")
    monkeypatch.syspath_prepend(tmp_path)
    return load_config(tmp_path / "mine.yaml")


def test_the_documented_functions_do_what_they_say(config: Config) -> None:
    (reward,) = resolve_rewards(config.rewards)
    sample = dict(prompt="1+1=", row={}, finish_reason="stop", answer="2")
    assert [reward.call(completion=text, **sample) for text in ("2", "3", "        2")] == [1.0, 0.0, 0.0]
    estimator = resolve_estimator(config.algorithm.advantage)
    found = estimator(rewards=torch.tensor([1.0, 0.0, 0.0, 2.0]), group_ids=torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == [0.5, -0.5, -0.5, 0.5]


def test_the_documented_loss_trains(config: Config) -> None:
    """At ratio 2 and advantage 1 with strength 5: d/dlogp (-r + 5 (r - 1)^2) = -2 + 10 * 2 = 18; at ratio 1: -1."""
    sequence = TrainingSequence(torch.tensor([3, 4, 5]).numpy(), torch.ones(2).numpy())
    micro_batch = pack([sequence], [0], pad_to_multiple=1)
    micro_batch.per_token.update(
        advantages=torch.ones(2),
        rollout_log_probs=torch.tensor([-1.0, -1.0]),
        old_log_probs=torch.tensor([-1.0, -1.0]),
    )
    log_probs = torch.tensor([-1.0 + torch.log(torch.tensor(2.0)), -1.0], requires_grad=True)
    loss, metrics = PolicyGradientObjective(
        config.algorithm,
        GlobalCounts(2.0, 1.0),
        8.0,
        policy_loss=resolve_policy_loss(config.algorithm.policy_loss),
        on_policy=False,
        kl_coefficient=0.0,
    )(log_probs, torch.zeros(2), micro_batch)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([9.0, -0.5], rel=1e-5)  # the mean of two tokens, of one sequence
    assert metrics["policy/ratio_max"].result() == pytest.approx(2.0, rel=1e-6)
