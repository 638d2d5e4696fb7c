"""Ranks without an engine wait for those that generate outside collectives: as long as tokens come."""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from megatron_rl.config.schema import RewardsConfig
from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.rewards.scoring import BoundReward
from tests.distributed.spawn import RankFailed, run_ranks

LIMIT = 1.0
PROMPT = Prompt(prompt_id=0, token_ids=(1,), text="", answer=None, source="")


class SlowEngine:
    """Generates for five times the limit, and may say nothing on the way."""

    def __init__(self, tells: bool) -> None:
        self._tells = tells

    def generate(
        self, prompts: Sequence[Prompt], *, on_progress: Callable[[int], None], **_: Any
    ) -> list[list[Completion]]:
        end = time.monotonic() + 5 * LIMIT
        while prompts and time.monotonic() < end:
            time.sleep(0.05)
            if self._tells:
                on_progress(0)
        return [[Completion((2,), (-1.0,), "x", "stop", 0)] for _ in prompts]


def generate_in_rank(rank: int, tells: bool) -> tuple[list[float], bool]:
    """Rewards of a step whose one engine is slow; and whether this rank's own clock has seen the progress."""
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.parallel.meeting import Meeting
    from megatron_rl.placement.layout import Layout
    from megatron_rl.runs.progress import PhaseTimer, Progress
    from megatron_rl.trainer.rollouts import RolloutWorker
    from tests.distributed.training_ranks import parallel_of

    groups = initialize(parallel_of("dp2"), seed=1)
    timer = PhaseTimer()
    meeting = Meeting.of_world("test", limit_seconds=LIMIT, on_progress=timer.progressed)
    meeting._poll /= 50
    reward = BoundReward("one", 1.0, lambda **_: 1.0)
    layout = Layout(1, 1, 2, engine_size=2)  # one engine of both ranks: the second has nothing to score
    engine = SlowEngine(tells) if rank == 0 else SlowEngine(False)
    worker = RolloutWorker(cast(Any, engine), [reward], layout, groups, meeting, config=RewardsConfig())
    started = time.time()
    prompts = [PROMPT]
    completions = (
        worker.generate(prompts, [0], cast(Any, None), 1, Progress(1, "test", enabled=False)) if rank == 0 else [[]]
    )
    samples = worker.score(prompts, completions)
    return [sample.reward for of_prompt in samples for sample in of_prompt], timer.progressed_at > started + 4 * LIMIT


def test_a_generation_five_times_the_limit_passes_if_it_progresses() -> None:
    assert run_ranks(generate_in_rank, 2, True) == [([1.0], True), ([1.0], True)]


def test_a_silent_generation_ends_the_wait_and_is_named() -> None:
    with pytest.raises(RankFailed) as failure:
        run_ranks(generate_in_rank, 2, False)
    assert "NoProgressError: generation and scoring: no rank has made progress for " in str(failure.value)
    assert "waited for rank 0" in str(failure.value)
