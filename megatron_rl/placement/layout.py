"""Which rank holds which part of the model, and which engine it drives. Arithmetic alone; no process group.

Ranks are numbered in Megatron's order `tp-cp-ep-dp-pp`: tensor-parallel neighbours are consecutive ranks, so that the
most frequent collectives stay on one node, and pipeline stages are farthest apart. With tp=2, dp=2, pp=2:

    rank       0 1 2 3 4 5 6 7
    tp rank    0 1 0 1 0 1 0 1
    dp rank    0 0 1 1 0 0 1 1
    pp rank    0 0 0 0 1 1 1 1

Context-parallel ranks lie between the two: neighbours of a tensor-parallel group, inside a replica. Experts are spread
over the same ranks of a pipeline stage, counted anew: expert-tensor fastest, then expert, then expert-data.

Engines are cut from the same line of ranks, by a size of their own: with engines of 4, ranks 0-3 and 4-7.
"""

from dataclasses import dataclass

from megatron_rl.config.schema import Config, EnginePlacement
from megatron_rl.config.world import data_parallel_size


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands in each parallel dimension."""

    tensor: int
    data: int
    pipeline: int
    context: int = 0


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions of training, and of an engine."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    data_parallel_size: int
    engine_size: int = 1
    """Consecutive ranks that share one engine; divides world_size."""
    remote_engines: int | None = None
    """Engines in processes of their own, of engine_size each; rank N drives number N. None: colocated."""
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """None: tensor_model_parallel_size."""

    @property
    def world_size(self) -> int:
        """Number of training ranks."""
        return self.stage_ranks * self.pipeline_model_parallel_size

    @property
    def stage_ranks(self) -> int:
        """Training ranks that hold the layers of one pipeline stage, all replicas together."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.data_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks with the same part of the same experts."""
        tensor = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        return self.stage_ranks // (tensor * self.expert_model_parallel_size)

    @property
    def num_engines(self) -> int:
        """Number of engines."""
        if self.remote_engines is not None:
            return self.remote_engines
        return self.world_size // self.engine_size

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank in [0, world_size) stands."""
        assert 0 <= rank < self.world_size
        outer, tensor = divmod(rank, self.tensor_model_parallel_size)
        outer, context = divmod(outer, self.context_parallel_size)
        pipeline, data = divmod(outer, self.data_parallel_size)
        return Coordinates(tensor, data, pipeline, context)

    def rank(self, at: Coordinates) -> int:
        """Inverse of `coordinates`."""
        outer = (at.pipeline * self.data_parallel_size + at.data) * self.context_parallel_size + at.context
        return outer * self.tensor_model_parallel_size + at.tensor

    def engine(self, rank: int) -> int | None:
        """Number of the engine, in [0, num_engines), that a rank is part of or drives; None: of none."""
        assert 0 <= rank < self.world_size
        if self.remote_engines is not None:
            return rank if rank < self.remote_engines else None
        return rank // self.engine_size

    def engine_ranks(self, engine: int) -> range:
        """Training ranks of an engine, in the order of vLLM's tensor-parallel ranks, or the one that drives it."""
        assert 0 <= engine < self.num_engines
        if self.remote_engines is not None:
            return range(engine, engine + 1)
        return range(engine * self.engine_size, (engine + 1) * self.engine_size)


def layout_of(config: Config, world_size: int | None = None) -> Layout:
    """Layout of a validated configuration.

    Args:
        config: validated.
        world_size: number of ranks that were started; None if they are yet to be started as the layout says.

    Raises:
        ConfigError: the sizes do not make up the world.
    """
    disaggregated = config.rollout.placement is EnginePlacement.disaggregated
    return Layout(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        data_parallel_size=data_parallel_size(config.parallel, world_size),
        engine_size=config.rollout.tensor_model_parallel_size,
        remote_engines=config.rollout.num_engines if disaggregated else None,
        context_parallel_size=config.parallel.context_parallel_size,
        expert_model_parallel_size=config.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_parallel_size,
    )
