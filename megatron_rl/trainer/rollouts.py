"""Prompts in, scored samples out: each engine makes and scores its own, then all ranks share them.

The k-th prompt drawn by a run is completed with seeds that depend on (run seed, k) alone. So a step's samples depend on
neither the number of engines nor on which of them made what, and a resumed run makes the same ones.
"""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_rl.config.schema import Config, EnginePlacement, RewardsConfig, RolloutConfig, SamplingConfig
from megatron_rl.data.samples import Completion, Prompt, Sample
from megatron_rl.parallel.groups import Groups
from megatron_rl.placement.layout import Layout
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.registry import BoundReward, RewardError
from megatron_rl.rewards.scoring import score
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.remote import NoEngine, RemoteEngine, server_arguments
from megatron_rl.rollout.sampling import Sampling
from megatron_rl.trainer.progress import Progress
from megatron_rl.trainer.tokenizer import load_tokenizer

Engine = RolloutEngine | RemoteEngine | NoEngine


def training_sampling(config: SamplingConfig) -> Sampling:
    """How training completions are sampled: from the whole distribution, at the configured temperature."""
    return Sampling(
        temperature=config.temperature,
        top_p=1.0,
        max_response_tokens=config.max_response_tokens,
        stop=tuple(config.stop),
    )


def build_engine(
    config: RolloutConfig, *, model_path: str, dtype: str, max_model_len: int, seed: int, batch_invariant: bool
) -> RolloutEngine:
    """This rank's engine, or its part of one."""
    return RolloutEngine(
        model_path=model_path,
        dtype=dtype,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_gigabytes=config.kv_cache_gigabytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=config.enforce_eager,
        seed=seed,
        quantization=config.quantization,
        batch_invariant=batch_invariant,
        record_routes=config.record_routes,
        engine_args=config.engine_args,
    )


def place_engine(config: Config, layout: Layout, groups: Groups, *, max_model_len: int) -> Engine:
    """This rank's engine, its part of one, or its hold on one in other processes; collective over the world."""
    if config.rollout.placement is EnginePlacement.disaggregated:
        return start_server(config, layout, groups, max_model_len=max_model_len)
    return build_engine(
        config.rollout,
        model_path=config.model.hf_path,
        dtype=config.model.params_dtype.value,
        max_model_len=max_model_len,
        seed=config.seed,
        batch_invariant=config.model.batch_invariant_mode,
    )


def build_pool(config: RewardsConfig) -> RewardPool | None:
    """Processes for the user's own reward functions, if they are to have any."""
    if not config.num_workers:
        return None
    memory = int(config.memory_gigabytes * 2**30)
    return RewardPool(num_workers=config.num_workers, timeout_s=config.timeout_seconds, memory_bytes=memory)


def start_server(config: Config, layout: Layout, groups: Groups, *, max_model_len: int) -> RemoteEngine | NoEngine:
    """The engine in processes of its own that this rank drives, if it does; collective over the world."""
    place: list[str | None] = [None]
    if groups.world.rank() == 0:
        parent = config.sync.folder or ("/dev/shm" if Path("/dev/shm").is_dir() else None)
        made = tempfile.mkdtemp(prefix="megatron_rl_", dir=parent)
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        place[0] = made
    dist.broadcast_object_list(place, src=0, group=groups.world)
    number = layout.engine(groups.world.rank())
    if number is None:
        return NoEngine(Path(str(place[0])))
    tokenizer = load_tokenizer(config.model.hf_path)
    rollout, run = config.rollout, Path(config.output_dir) / config.name
    engine = RemoteEngine(
        model_path=config.model.hf_path,
        arguments=server_arguments(rollout, dtype=config.model.params_dtype.value, seed=config.seed),
        folder=Path(str(place[0])),
        log=run / "logs" / f"engine_{number}.log",
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
        max_model_len=max_model_len,
        update_mode=rollout.in_flight.name,
    )
    atexit.register(engine.shutdown)
    return engine


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
        *,
        config: RewardsConfig,
    ) -> None:
        self.engine, self.rewards = engine, rewards
        self._pool = build_pool(config)
        self._lost_value = config.lost_value
        rank = dist.get_rank()
        number = layout.engine(rank)
        self._engine_number, self._num_engines = number, layout.num_engines
        self._leads_engine = number is not None and rank == layout.engine_ranks(number)[0]
        self._world = groups.world

    def mine(self, count: int) -> range:
        """Which of `count` prompts this rank's engine completes."""
        return range(0) if self._engine_number is None else range(self._engine_number, count, self._num_engines)

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, num_samples: int, progress: Progress
    ) -> list[list[Completion]]:
        """Completions of this engine's share of the prompts, `num_samples` of each."""
        chosen = self.mine(len(prompts))
        if not chosen:
            return []
        with progress.nested(len(chosen) * num_samples, "generate") as bar:
            return self.engine.generate(
                [prompts[i] for i in chosen],
                num_samples=num_samples,
                sampling=sampling,
                seeds=[seeds[i] for i in chosen],
                on_progress=bar.update,
            )

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
                    )
                )
                samples = [(index, [next(of_all) for _ in of_prompt]) for index, of_prompt in mine]
            except RewardError as error:
                failure = error
        said = None if failure is None else str(failure)
        gathered: list[Any] = [None] * dist.get_world_size(self._world)
        dist.all_gather_object(gathered, (said, samples), group=self._world)
        for message, _ in gathered:
            if message is not None:
                raise RewardError(message) from failure
        by_prompt = dict(pair for _, of_rank in gathered for pair in of_rank)
        return [by_prompt[index] for index in range(len(prompts))]
