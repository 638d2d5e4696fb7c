"""Which pipeline stage holds how many layers, by Megatron's rules; from the configuration alone.

Without further words every stage holds as many layers. A first or last stage of a size of its own leaves the rest to be
split evenly. Where the embedding or the output layer is accounted for, it takes the place of one layer. With virtual
pipeline stages each stage holds that many chunks, and layers go to chunk 0 of every stage before chunk 1 of the first.
"""

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import ParallelConfig

_SIZE = "parallel.pipeline_model_parallel_size"
_UNEVEN = "parallel.num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage"


def layers_of_stages(parallel: ParallelConfig, num_layers: int) -> list[list[int]]:
    """Number of layers of each chunk: [stage][chunk].

    Raises:
        ConfigError: the layers cannot be split so.
    """
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    uneven = (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage)
    accounted = (parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split)
    if uneven != (None, None):
        if any(accounted):
            raise ConfigError(
                f"{_UNEVEN}: given with account_for_embedding_in_pipeline_split or "
                "account_for_loss_in_pipeline_split, allowed: one of the two ways"
            )
        sizes = _around(uneven, pp, num_layers)
    else:
        places = num_layers + sum(accounted)
        if places % pp:
            counted = f", counted as {places}" if any(accounted) else ""
            raise ConfigError(f"{_SIZE}: given {pp}, allowed: a divisor of the model's {num_layers} layers{counted}")
        sizes = [places // pp] * pp
    if bad := [size for size in sizes if size % chunks]:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size: given {chunks}, "
            f"allowed: a divisor of a stage's {bad[0]} layers"
        )
    stages = [[size // chunks] * chunks for size in sizes]
    stages[0][0] -= accounted[0]
    stages[-1][-1] -= accounted[1]
    if min(min(stage) for stage in stages) < 1:
        raise ConfigError(f"{_SIZE}: given {pp}, allowed: at least one layer in every chunk of every stage")
    return stages


def _around(uneven: tuple[int | None, int | None], pp: int, num_layers: int) -> list[int]:
    """Sizes of the stages when the first, the last or both have one of their own."""
    first, last = ([] if size is None else [size] for size in uneven)
    between = pp - len(first) - len(last)
    rest = num_layers - sum(first) - sum(last)
    if pp == 1 or between < 0 or rest < between or (rest % between if between else rest):
        raise ConfigError(
            f"{_UNEVEN}: given {uneven[0]} and {uneven[1]}, which leave {rest} of {num_layers} layers to {between} "
            "stages; allowed: what these can share evenly"
        )
    return first + [rest // between] * between + last if between else first + last
