"""Rewards to advantages of tokens, on literal samples in micro-batches: kinds of estimators, token rewards,
whitening."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.advantages import RunningBaseline
from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import AdvantageConfig, Whitening
from megatron_rl.data.datasets import training_sequence
from megatron_rl.data.packing import MicroBatch, pack, unpack
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.objectives.advantages import add_advantages, is_of_tokens, needs_critic, resolve_estimator


@pytest.fixture
def world() -> Iterator[Any]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def sample(prompt_id: int, num_tokens: int, reward: float, token_rewards: tuple[float, ...] | None = None) -> Sample:
    prompt = Prompt(prompt_id, (7, 8), "p", None, "f:1")
    completion = Completion((9,) * num_tokens, (-1.0,) * num_tokens, "t", "stop", 0)
    return Sample(prompt, completion, reward, {}, token_rewards)


def micro_batches_of(samples: list[Sample]) -> list[MicroBatch]:
    """Two micro-batches with padding, the samples not in their order."""
    sequences = [training_sequence(one) for one in samples]
    ids = list(range(len(samples)))
    return [pack(sequences, ids[1:], pad_to_multiple=16), pack(sequences, ids[:1], pad_to_multiple=8)]


def advantages_of(
    samples: list[Sample],
    config: AdvantageConfig,
    world: Any,
    baseline: RunningBaseline | None = None,
    **values: Tensor,
) -> tuple[list[float], dict[int, list[float]], list[MicroBatch]]:
    """(of completions, of their trained tokens, micro-batches)."""
    micro_batches = micro_batches_of(samples)
    for micro_batch in micro_batches:
        micro_batch.per_token.update({name: value[: len(micro_batch.tokens)] for name, value in values.items()})
    found = add_advantages(
        samples,
        micro_batches,
        config=config,
        estimator=resolve_estimator(config),
        baseline=baseline or RunningBaseline(),
        dp=world,
    )
    of_tokens = {}
    for micro_batch in micro_batches:
        for i, part in zip(
            micro_batch.sequence_ids, unpack(micro_batch.per_token["advantages"], micro_batch), strict=True
        ):
            of_tokens[i] = part.tolist()[1:]  # the prompt's position has none
            assert part[0] == 0
    return found.tolist(), of_tokens, micro_batches


SAMPLES = [sample(0, 1, 1.0), sample(0, 2, 0.0), sample(5, 2, 3.0)]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("reward", [1.0, 0.0, 3.0]),
        ("leave_one_out", [1.0, -1.0, 0.0]),
        ("running_baseline", [0.5, -0.5, 2.5]),
    ],
)
def test_estimators_of_completions(world: Any, estimator: str, expected: list[float]) -> None:
    config = AdvantageConfig(estimator=estimator)
    found, of_tokens, _ = advantages_of(SAMPLES, config, world, RunningBaseline(0.5, 3))
    assert found == expected
    assert of_tokens == {0: [expected[0]], 1: [expected[1]] * 2, 2: [expected[2]] * 2}


def test_returns_are_discounted_from_the_last_token(world: Any) -> None:
    found, of_tokens, _ = advantages_of(SAMPLES, AdvantageConfig(estimator="monte_carlo", gamma=0.5), world)
    assert of_tokens == {0: [1.0], 1: [0.0, 0.0], 2: [1.5, 3.0]}
    assert found == [1.0, 0.0, 2.25]


def test_process_rewards_lie_where_they_were_earned(world: Any) -> None:
    """Of a reward of 3, steps gave 0.5 and 1.5: what is left, 1, comes at the end."""
    samples = [sample(0, 2, 3.0, (0.5, 1.5)), sample(0, 1, 1.0, (0.0,))]
    _, of_tokens, _ = advantages_of(samples, AdvantageConfig(estimator="monte_carlo"), world)
    assert of_tokens == {0: [3.0, 2.5], 1: [1.0]}
    # An estimator of completions gets their sum.
    found, _, _ = advantages_of(samples, AdvantageConfig(estimator="leave_one_out"), world)
    assert found == [2.0, -2.0]


def test_gae_gives_the_critic_its_returns(world: Any) -> None:
    values = torch.full((16,), 0.5)
    config = AdvantageConfig(estimator="gae", gamma=1.0, lam=1.0)
    _, of_tokens, micro_batches = advantages_of(SAMPLES, config, world, values=values)
    # lambda 1: return minus value.
    assert of_tokens == {0: [0.5], 1: [-0.5, -0.5], 2: [2.5, 2.5]}
    assert micro_batches[0].per_token["returns"].tolist()[:6] == [0, 0, 0, 0, 3, 3]
    _, of_tokens, _ = advantages_of(SAMPLES, AdvantageConfig(estimator="td0"), world, values=values)
    assert of_tokens == {0: [0.5], 1: [0.0, -0.5], 2: [0.0, 2.5]}


def test_a_critic_beside_a_groups_advantages_gets_returns_too(world: Any) -> None:
    config = AdvantageConfig(estimator="group_relative", normalize_by_std=False, gamma=0.5)
    with_values, _, micro_batches = advantages_of(SAMPLES, config, world, values=torch.full((16,), 0.5))
    assert with_values == advantages_of(SAMPLES, config, world)[0]
    # As of `monte_carlo`: a reward of 3 at the last of two tokens is 1.5 at the first.
    assert micro_batches[0].per_token["returns"].tolist()[:6] == [0, 0, 0, 0, 1.5, 3]


def test_whitening_is_over_all_tokens_of_the_batch(world: Any) -> None:
    config = AdvantageConfig(estimator="reward", whiten=Whitening.full, std_epsilon=0.0)
    # Tokens 1, 0, 0, 3, 3: mean 7/5, variance 19/5 - 49/25 = 46/25.
    found, _, _ = advantages_of(SAMPLES, config, world)
    assert found == pytest.approx([(x - 1.4) / 1.84**0.5 for x in (1, 0, 3)])
    config = AdvantageConfig(estimator="reward", whiten=Whitening.scale, std_epsilon=0.0)
    assert advantages_of(SAMPLES, config, world)[0] == pytest.approx([x / 1.84**0.5 for x in (1, 0, 3)])


def test_a_users_estimator_takes_what_it_names(world: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_estimators.py").write_text(
        "def of_best(rewards, group_ids, *, share):\n"
        "    return (rewards == rewards.max()).float() * share\n"
        "def of_position(rewards, loss_mask, *, gamma):\n"
        "    return loss_mask.cumsum(0) * gamma\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = AdvantageConfig(estimator="own_estimators:of_best", args={"share": 2.0})
    assert advantages_of(SAMPLES, config, world)[0] == [0.0, 0.0, 2.0]
    config = AdvantageConfig(estimator="own_estimators:of_position", gamma=0.5)
    assert advantages_of(SAMPLES, config, world)[1] == {0: [0.5], 1: [0.5, 1.0], 2: [1.5, 2.0]}


@pytest.mark.parametrize(
    ("name", "of_tokens", "critic"),
    [("group_relative", False, False), ("monte_carlo", True, False), ("gae", True, True), ("td0", True, True)],
)
def test_what_an_estimator_names_decides_what_it_gets(name: str, of_tokens: bool, critic: bool) -> None:
    estimator = resolve_estimator(AdvantageConfig(estimator=name))
    assert (is_of_tokens(estimator), needs_critic(estimator)) == (of_tokens, critic)


def test_an_estimator_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"algorithm\.advantage\.estimator: no built-in .* did you mean 'gae'\?"):
        resolve_estimator(AdvantageConfig(estimator="gea"))
    with pytest.raises(UserError, match=r"algorithm\.advantage\.args: 'gae' takes no argument 'lambda'"):
        resolve_estimator(AdvantageConfig(estimator="gae", args={"lambda": 0.9}))
