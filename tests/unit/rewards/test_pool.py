"""A verifier that hangs, eats memory or crashes costs its sample, and leaves nothing behind."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config.schema import RewardFunctionConfig, RewardsConfig
from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.scoring import RewardError, resolve_rewards, score

VERIFIER = "tests.unit.rewards.verifiers:obedient"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    running = RewardPool(num_workers=2, timeout_s=3.0, memory_bytes=1 << 30)
    yield running
    running.close()


def score_with(pool: RewardPool | None, *texts: str, **args: Any) -> list[Any]:
    rewards = resolve_rewards(RewardsConfig(functions=[RewardFunctionConfig(VERIFIER, 2.0, args)]))
    prompt = Prompt(4, (1, 2), "2+2=", "4", "train.jsonl:5", {"level": 3})
    completions = [Completion((7,), (-1.0,), text, "stop", 0) for text in texts]
    return score([prompt] * len(texts), completions, rewards, pool=pool, lost_value=-1.0)


def test_answers_are_those_of_a_call_here_and_in_order(pool: RewardPool) -> None:
    texts = ["a", "bb", "print x", "dddd", "sleep 0.2", "f" * 40]
    here, there = score_with(None, *texts, scale=0.5), score_with(pool, *texts, scale=0.5)
    assert here == there
    assert [sample.reward for sample in there] == [2 * 0.5 * len(text) for text in texts]


def test_bad_samples_are_lost_and_good_ones_are_not(pool: RewardPool) -> None:
    samples = score_with(pool, "a", "sleep 600", "bb", "die", "eat 2", "ccc")
    assert [sample.reward for sample in samples] == [2.0, -2.0, 4.0, -2.0, -2.0, 6.0]
    assert [sample.lost for sample in samples] == [
        (),
        (f"{VERIFIER}: took longer than 3 s",),
        (),
        (f"{VERIFIER}: ended its process (SIGSEGV)",),
        (f"{VERIFIER}: ran out of memory",),
        (),
    ]


def test_what_a_verifier_started_is_ended_with_it(pool: RewardPool, tmp_path: Path) -> None:
    (sample,) = score_with(pool, f"spawn {tmp_path / 'pid'}")
    assert sample.lost
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10.0
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("text", ["raise level", "text 1.0", "nan"])
def test_a_mistake_in_a_function_is_told_as_it_is_here(pool: RewardPool, text: str) -> None:
    messages = []
    for where in (None, pool):
        with pytest.raises(RewardError) as caught:
            score_with(where, "a", text)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "sample train.jsonl:5" in messages[0]


def test_a_signal_to_the_whole_job_costs_no_sample(pool: RewardPool) -> None:
    score_with(pool, "a", "b")
    for worker in pool._idle:
        worker.process.send_signal(signal.SIGUSR1)
        worker.process.send_signal(signal.SIGTERM)
    assert not any(sample.lost for sample in score_with(pool, "a", "b"))


def test_workers_are_used_again(pool: RewardPool) -> None:
    score_with(pool, "a", "b")
    before = {worker.process.pid for worker in pool._idle}
    score_with(pool, "a", "b", "c")
    assert {worker.process.pid for worker in pool._idle} == before
    assert 1 <= len(before) <= 2
