"""Which prompts make up a batch under dynamic sampling, and how length is punished."""

from dataclasses import replace

import pytest

from megatron_rl.config.schema import OverlongConfig
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.objectives.penalties import punish_length
from megatron_rl.trainer.rollouts import Collection


def group(prompt_id: int, *rewards: float, num_tokens: int = 1) -> list[Sample]:
    completion = Completion((9,) * num_tokens, (-1.0,) * num_tokens, "t", "stop", 0)
    return [Sample(Prompt(prompt_id, (7,), "p", None, "f:1"), completion, reward, {}) for reward in rewards]


def ids(collection: Collection) -> list[int]:
    return [sample.prompt.prompt_id for sample in collection.samples]


def test_without_rounds_every_prompt_stays() -> None:
    collection = Collection(num_prompts=2, max_rounds=1)
    assert collection.num_missing == 2
    collection.add([group(0, 1.0, 1.0), group(1, 0.0, 1.0)])
    assert collection.num_missing == 0
    assert ids(collection) == [0, 0, 1, 1]
    assert collection.metrics() == {}


def test_prompts_without_contrast_are_replaced() -> None:
    collection = Collection(num_prompts=2, max_rounds=3)
    collection.add([group(0, 1.0, 1.0), group(1, 0.0, 1.0)])
    assert collection.num_missing == 1
    collection.add([group(2, 0.0, 0.0)])
    assert collection.num_missing == 1
    collection.add([group(3, 0.5, 1.0)])
    assert collection.num_missing == 0
    assert ids(collection) == [1, 1, 3, 3]
    assert collection.metrics() == {"sampling/rounds": 3, "sampling/kept_fraction": 0.5}


def test_after_the_last_round_the_batch_is_filled() -> None:
    collection = Collection(num_prompts=2, max_rounds=2)
    collection.add([group(0, 1.0, 1.0), group(1, 0.0, 0.0)])
    collection.add([group(2, 1.0, 0.0), group(3, 1.0, 1.0)])
    assert collection.num_missing == 0
    assert ids(collection) == [2, 2, 0, 0]


@pytest.mark.parametrize(("num_tokens", "term"), [(4, 0.0), (6, 0.0), (7, -0.5), (8, -1.0)])
def test_length_is_punished_over_the_buffer(num_tokens: int, term: float) -> None:
    """The limit is 8 and the buffer its last 2 tokens."""
    config = OverlongConfig(buffer_tokens=2, penalty=3.0)
    (sample,) = punish_length(group(0, 1.0, num_tokens=num_tokens), config, max_tokens=8)
    assert sample.reward == 1.0 + 3.0 * term
    assert sample.reward_terms == {"overlong": term}
    assert punish_length([sample], OverlongConfig(), max_tokens=8) == [sample]


def test_a_penalty_of_length_is_no_contrast() -> None:
    wrong = [
        sample
        for tokens in (14, 15, 16)
        for sample in punish_length(
            [replace(group(0, 0.0, num_tokens=tokens)[0], reward_terms={"right": 0.0})],
            OverlongConfig(buffer_tokens=4),
            max_tokens=16,
        )
    ]
    assert len({sample.reward for sample in wrong}) > 1
    for term in (None, "right"):
        collection = Collection(1, 3, term)
        collection.add([wrong])
        assert collection.num_missing == 1
    collection = Collection(1, 3, "right")
    collection.add([[wrong[0], replace(wrong[1], reward_terms={"right": 1.0})]])
    assert collection.num_missing == 0
