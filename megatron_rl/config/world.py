"""How many ranks, replicas and engines a configuration comes to, and how long its sequences are."""

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import Config, EnginePlacement, ParallelConfig


def number_of_engines(config: Config, num_ranks: int) -> int:
    """Engines of a run with so many training ranks."""
    if config.rollout.placement is EnginePlacement.disaggregated:
        return config.rollout.num_engines
    return num_ranks // config.rollout.tensor_model_parallel_size


def replica_ranks(parallel: ParallelConfig) -> int:
    """Ranks that hold one replica of the model and share its rows."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def data_parallel_size(parallel: ParallelConfig, world_size: int | None) -> int:
    """Number of replicas: what was asked for, else what the ranks leave; 1 if neither is known.

    Raises:
        ConfigError: the layout does not make up the world.
    """
    model_ranks = replica_ranks(parallel)
    if world_size is None:
        return parallel.data_parallel_size or 1
    product = (
        f"tensor_model_parallel_size {parallel.tensor_model_parallel_size} x "
        f"pipeline_model_parallel_size {parallel.pipeline_model_parallel_size}"
    )
    if parallel.context_parallel_size > 1:
        product += f" x context_parallel_size {parallel.context_parallel_size}"
    if parallel.data_parallel_size is None:
        if world_size % model_ranks:
            raise ConfigError(f"parallel: given {product} for {world_size} ranks, allowed: a divisor of their number")
        return world_size // model_ranks
    if world_size != model_ranks * parallel.data_parallel_size:
        product += f" x data_parallel_size {parallel.data_parallel_size} = {model_ranks * parallel.data_parallel_size}"
        raise ConfigError(f"parallel: given {product}, allowed: {world_size}, the number of ranks")
    return parallel.data_parallel_size


def num_ranks(config: Config, world_size: int | None) -> int:
    """Training ranks: those that were started, else those that the layout needs."""
    parallel = config.parallel
    return replica_ranks(parallel) * data_parallel_size(parallel, world_size)


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt + response that is trained on."""
    return config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens
