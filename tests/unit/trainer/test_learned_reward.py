"""What a learned reward makes of a sample: its total, its terms and the rewards of its tokens."""

import numpy as np
import pytest
import torch

from megatron_rl.config.schema import RewardModelConfig, RewardModelKind, RewardScale, StepCredit
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.trainer.learned_reward import scored

# A prompt of two tokens; steps are "5 9" and "6 9", and what is left, "7".
PROMPT = Prompt(0, (1, 2), "p", None, "here:1")
SAMPLE = Sample(PROMPT, Completion((5, 9, 6, 9, 7), (0.0,) * 5, "", "stop", 0), 0.5, {"format": 0.5})
VALUES = torch.tensor([50.0, 60.0, 10.0, 1.0, 20.0, 3.0, 4.0])
ENDS = np.arange(10) == 9


def test_an_outcome_is_the_last_tokens() -> None:
    got = scored(SAMPLE, VALUES, RewardModelConfig(weight=2.0), ENDS)
    assert (got.reward, got.reward_terms, got.token_rewards) == (0.5 + 2 * 4, {"format": 0.5, "model": 4.0}, None)
    assert scored(SAMPLE, VALUES[-1:], RewardModelConfig(), ENDS).reward == 4.5  # a server sends no other


@pytest.mark.parametrize(
    ("credit", "of_tokens"),
    [
        (StepCredit.step_end, (0, 1, 0, 3, 4)),
        (StepCredit.spread, (0.5, 0.5, 1.5, 1.5, 4)),
        (StepCredit.progress, (0, 1, 0, 2, 1)),  # adds up to the last score
    ],
)
def test_steps(credit: StepCredit, of_tokens: tuple[float, ...]) -> None:
    config = RewardModelConfig(kind=RewardModelKind.process, credit=credit, weight=2.0)
    got = scored(SAMPLE, VALUES, config, ENDS)
    assert got.token_rewards == tuple(2 * reward for reward in of_tokens)
    assert got.reward_terms["model"] == sum(of_tokens)
    assert got.reward == 0.5 + 2 * sum(of_tokens)


def test_the_scale_comes_first() -> None:
    config = RewardModelConfig(kind=RewardModelKind.process, credit=StepCredit.progress, scale=RewardScale.probability)
    got = scored(SAMPLE, torch.tensor([0.0, 0.0, 9.0, 0.0, 9.0, 3.0, 0.0]).log(), config, ENDS)
    # Odds 0, 3 and 0: probabilities 0, 3/4 and 0.
    assert got.token_rewards == pytest.approx((0, 0, 0, 0.75, -0.75))
