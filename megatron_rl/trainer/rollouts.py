"""Prompts in, scored samples out: rollouts of all engines, dynamic sampling, and what is reported of the samples.

Each engine makes and scores its own part, then all ranks share them. The k-th prompt drawn by a run is completed with
seeds that depend on (run seed, k) alone. So a step's samples depend on neither the number of engines nor on which of
them made what, and a resumed run makes the same ones. An engine that is lost on the way is brought back and makes its
part again.

`Collection` holds the samples of one step. Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): a prompt whose
completions are all as right teaches nothing, so it is replaced by another one, until the batch is full or the
rounds are spent. What is missing then is filled with such prompts, so that a step always has its size, and a run cannot
hang on data that is too easy.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.advantages import informative
from megatron_rl.config.schema import RewardsConfig, SamplingConfig
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.objectives.penalties import NAME as OVERLONG
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.meeting import Meeting
from megatron_rl.placement.layout import Layout
from megatron_rl.rewards.pool import build_pool
from megatron_rl.rewards.scoring import BoundReward, RewardError, score
from megatron_rl.rollout.address import EngineLost
from megatron_rl.rollout.remote import NoEngine, RemoteEngine
from megatron_rl.rollout.sampling import Sampling
from megatron_rl.runs.progress import Progress
from megatron_rl.sync.engines import Engine

_LOSSES = 3
"""Of one generation, until the run gives up."""


def training_sampling(config: SamplingConfig) -> Sampling:
    """How training completions are sampled: from the whole distribution, at the configured temperature."""
    return Sampling(
        temperature=config.temperature,
        top_p=1.0,
        max_response_tokens=config.max_response_tokens,
        stop=tuple(config.stop),
    )


def draw_seeds(run_seed: int, position: int, count: int) -> list[int]:
    """Sampling seeds of the prompts drawn at `position`, `position + 1`, ...: 31 bits each."""
    return [int(np.random.SeedSequence([run_seed, position + i]).generate_state(1)[0] >> 1) for i in range(count)]


class RolloutWorker:
    """Generates and scores on this rank's engine, in step with the others."""

    def __init__(
        self,
        engine: Engine,
        rewards: Sequence[BoundReward],
        layout: Layout,
        groups: Groups,
        meeting: Meeting,
        *,
        config: RewardsConfig,
    ) -> None:
        self._meeting = meeting
        self.engine, self.rewards = engine, rewards
        self._pool = build_pool(config)
        self._lost_value = config.lost_value
        rank = dist.get_rank()
        number = layout.engine(rank)
        self._engine_number, self._num_engines = number, layout.num_engines
        self._leads_engine = number is not None and rank == layout.engine_ranks(number)[0]
        self._world = groups.world
        self.bring_back: Callable[[], object] = lambda: None
        """Called by all ranks when an engine has been lost: starts it again and gives it the present weights."""

    def mine(self, count: int) -> range:
        """Which of `count` prompts this rank's engine completes."""
        return range(0) if self._engine_number is None else range(self._engine_number, count, self._num_engines)

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, num_samples: int, progress: Progress
    ) -> list[list[Completion]]:
        """Completions of this engine's share of the prompts, `num_samples` of each; collective over the world.

        Raises:
            EngineLost: an engine was lost, and came back, several times.
        """
        chosen = self.mine(len(prompts))
        completions: list[list[Completion]] | None = None if chosen else []
        for _ in range(_LOSSES):
            lost: str | None = None
            if completions is None:
                try:
                    with progress.nested(len(chosen) * num_samples, "generate") as bar:
                        completions = self.engine.generate(
                            [prompts[i] for i in chosen],
                            num_samples=num_samples,
                            sampling=sampling,
                            seeds=[seeds[i] for i in chosen],
                            on_progress=lambda count: self._progressed(bar, count),
                        )
                except EngineLost as error:
                    lost = str(error)
            reason = self._loss_anywhere(lost)
            if reason is None:
                assert completions is not None
                return completions
            self.bring_back()
        raise EngineLost(f"engines were lost {_LOSSES} times in one generation: {reason}")

    def _progressed(self, bar: Progress, count: int) -> None:
        bar.update(count)
        self._meeting.progressed()

    def _loss_anywhere(self, lost: str | None) -> str | None:
        """Why an engine of any rank has been lost, the same answer on all ranks; None: none has."""
        if not isinstance(self.engine, RemoteEngine | NoEngine):  # inside the ranks: it is not lost alone
            return None
        self._meeting.wait("generation")
        losses: list[str | None] = [None] * dist.get_world_size(self._world)
        dist.all_gather_object(losses, lost, group=self._world)
        reason = next((loss for loss in losses if loss is not None), None)
        if reason is not None and dist.get_rank(self._world) == 0:
            print(f"megatron-rl: {reason}; the engine is brought back", flush=True)
        return reason

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Sample]]:
        """Score this engine's completions, and gather everyone's: one list per prompt, in the order of the prompts.

        Raises:
            RewardError: a reward function failed on a sample of any rank; all ranks raise it, which names the sample.
        """
        samples: list[tuple[int, list[Sample]]] = []
        failure: RewardError | None = None
        if self._leads_engine:
            try:
                mine = list(zip(self.mine(len(prompts)), completions, strict=True))
                of_all = iter(
                    score(
                        [prompts[index] for index, of_prompt in mine for _ in of_prompt],
                        [completion for _, of_prompt in mine for completion in of_prompt],
                        self.rewards,
                        pool=self._pool,
                        lost_value=self._lost_value,
                        on_progress=self._meeting.progressed,
                    )
                )
                samples = [(index, [next(of_all) for _ in of_prompt]) for index, of_prompt in mine]
            except RewardError as error:
                failure = error
        said = None if failure is None else str(failure)
        self._meeting.wait("generation and scoring")
        gathered: list[Any] = [None] * dist.get_world_size(self._world)
        dist.all_gather_object(gathered, (said, samples), group=self._world)
        for message, _ in gathered:
            if message is not None:
                raise RewardError(message) from failure
        by_prompt = dict(pair for _, of_rank in gathered for pair in of_rank)
        return [by_prompt[index] for index in range(len(prompts))]


class Collection:
    """Groups of samples, one per prompt, on their way to a full batch."""

    def __init__(self, num_prompts: int, max_rounds: int, term: str | None = None) -> None:
        """Args:
        num_prompts: of a full batch.
        max_rounds: of generation; with 1 every group is kept.
        term: the reward whose contrast counts; None: the first.
        """
        self.num_prompts, self.max_rounds, self._term = num_prompts, max_rounds, term
        self.num_rounds = 0
        self._kept: list[Sequence[Sample]] = []
        self._spare: list[Sequence[Sample]] = []

    @property
    def num_missing(self) -> int:
        """Prompts to draw in the next round; 0: the batch is complete."""
        return 0 if self.num_rounds == self.max_rounds else self.num_prompts - len(self._kept)

    def add(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Take in one round's samples, by prompt."""
        self.num_rounds += 1
        for group in groups:
            (self._kept if self.max_rounds == 1 or _has_contrast(group, self._term) else self._spare).append(group)

    @property
    def samples(self) -> list[Sample]:
        """Those of a complete batch."""
        groups = [*self._kept, *self._spare][: self.num_prompts]
        return [sample for group in groups for sample in group]

    def metrics(self) -> dict[str, float]:
        """sampling/rounds, and sampling/kept_fraction: drawn prompts with contrast; {} without dynamic sampling."""
        if self.max_rounds == 1:
            return {}
        drawn = len(self._kept) + len(self._spare)
        return {"sampling/rounds": self.num_rounds, "sampling/kept_fraction": len(self._kept) / drawn}


def _has_contrast(group: Sequence[Sample], term: str | None) -> bool:
    """Whether the completions differ in correctness; a penalty, of length say, is no contrast.

    DAPO, arXiv:2503.14476, section 3.2: accuracy neither 0 nor 1.
    """
    if term is None:
        term = next((name for name in group[0].reward_terms if name != OVERLONG), None)
    values = [sample.reward if term is None else sample.reward_terms[term] for sample in group]
    rewards = torch.tensor(values, dtype=torch.float64)
    return bool(informative(rewards, torch.zeros(len(group), dtype=torch.int64)).any())


def sample_metrics(samples: Sequence[Sample], *, version: int) -> dict[str, float]:
    """Metrics reward/*, response/*, staleness/* and throughput/tokens.

    Args:
        version: of the weights that the samples train.
    """
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    lengths = torch.tensor([len(sample.completion.token_ids) for sample in samples], dtype=torch.float64)
    truncated = [sample.completion.finish_reason == "length" for sample in samples]
    ages = [version - sample.completion.weight_version for sample in samples]
    num_lost = sum(len(sample.lost) for sample in samples)
    terms = {
        f"reward/{name}": sum(sample.reward_terms[name] for sample in samples) / len(samples)
        for name in samples[0].reward_terms
    }
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        **terms,
        **_verdicts(samples),
        **({"reward/lost": float(num_lost)} if num_lost else {}),
        "response/length_mean": float(lengths.mean()),
        "response/truncated_fraction": sum(truncated) / len(truncated),
        "staleness/mean": sum(ages) / len(ages),
        "staleness/max": max(ages),
        "throughput/tokens": float(lengths.sum()) + sum(len(sample.prompt.token_ids) for sample in samples),
    }


def _verdicts(samples: Sequence[Sample]) -> dict[str, float]:
    """Shares of the verdicts that rewards noted, unknown among them also at 0: reward/math_answer/unknown."""
    notes = [(name, note["verdict"]) for sample in samples for name, note in sample.notes.items() if "verdict" in note]
    unknown = {f"reward/{name}/unknown": 0.0 for name, _ in sorted(notes)}
    counts = sorted(Counter(notes).items())
    return unknown | {f"reward/{name}/{verdict}": count / len(samples) for (name, verdict), count in counts}


def sample_records(samples: Sequence[Sample], advantages: Tensor, *, step: int, count: int) -> list[dict[str, Any]]:
    """`count` of the samples, evenly spaced, as `runs.logs` writes them.

    Args:
        advantages: [samples].
        step: that made them.
    """
    every = max(1, len(samples) // max(1, count))
    return [_record(samples[i], float(advantages[i]), step) for i in range(0, len(samples), every)[:count]]


def _record(sample: Sample, advantage: float, step: int) -> dict[str, Any]:
    prompt, completion = sample.prompt, sample.completion
    return {
        "step": step,
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "prompt": prompt.text,
        "completion": completion.text,
        "answer": prompt.answer,
        "reward": sample.reward,
        "reward_terms": sample.reward_terms,
        **({"notes": sample.notes} if sample.notes else {}),
        "advantage": advantage,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "weight_version": completion.weight_version,
    }
