"""The sizes of a run's layout, from the configuration alone: ranks, replicas, engines, and layers of stages.

Layers of pipeline stages follow Megatron's rules. Without further words every stage holds as many layers. A first or
last stage of a size of its own leaves the rest to be split evenly. Where the embedding or the output layer is accounted
for, it takes the place of one layer. With virtual pipeline stages each stage holds that many chunks, and layers go to
chunk 0 of every stage before chunk 1 of the first.

`check_experts` refuses what does not go with a model that has experts, or has none.
"""

from megatron_rl.config.errors import ConfigError, refuse
from megatron_rl.config.hf_checkpoint import ModelShape
from megatron_rl.config.schema import Config, EnginePlacement, ParallelConfig


def number_of_engines(config: Config, num_ranks: int) -> int:
    """Engines of a run with so many training ranks."""
    if config.rollout.placement is EnginePlacement.disaggregated:
        return config.rollout.num_engines
    return num_ranks // config.rollout.tensor_model_parallel_size


def replica_ranks(parallel: ParallelConfig) -> int:
    """Ranks that hold one replica of the model and share its micro-batches."""
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


_BIASED_EXPERTS = ("GptOssForCausalLM",)
"""Core adds an expert's bias on every rank that holds a part of the expert."""
_BALANCING_TYPES = ("none", "aux_loss")


def check_experts(config: Config, shape: ModelShape) -> None:
    """Raise ConfigError for the first choice about experts that this model or layout does not have."""
    parallel = config.parallel
    _check_balancing(config)
    _check_recorded_routes(config)
    if config.model.moe_routing_replay:
        if not shape.num_experts:
            refuse("model.moe_routing_replay", True, "false for a model without experts")
        if config.model.recompute_granularity == "full" and parallel.pipeline_model_parallel_size > 1:
            # The backward pass chooses anew, of a micro-batch that another one has followed by then.
            refuse("model.moe_routing_replay", True, "false with recompute_granularity full in a pipeline")
    if not shape.num_experts:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(parallel, name) not in (None, 1):
                refuse(f"parallel.{name}", getattr(parallel, name), "1 for a model without experts")
        return
    _check_split_of_experts(parallel, shape)
    if shape.num_experts % parallel.expert_model_parallel_size:
        key = "parallel.expert_model_parallel_size"
        refuse(key, parallel.expert_model_parallel_size, f"a divisor of the model's {shape.num_experts} experts")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        refuse("parallel.sequence_parallel", False, "true for a model with experts and tensor_model_parallel_size > 1")


def _check_split_of_experts(parallel: ParallelConfig, shape: ModelShape) -> None:
    key, parts = "parallel.expert_tensor_parallel_size", parallel.expert_tensor_parallel_size
    if parts is None:
        parts = parallel.tensor_model_parallel_size
    if parts > 1 and shape.architecture in _BIASED_EXPERTS:
        refuse(
            key,
            parts,
            f"1 for {shape.architecture}, whose experts have biases; they are spread by "
            "parallel.expert_model_parallel_size",
        )
    if shape.expert_intermediate_size % parts:
        refuse(key, parts, f"a divisor of the {shape.expert_intermediate_size} channels of an expert")


def _check_balancing(config: Config) -> None:
    fields = config.model.transformer_config
    kind = fields.get("moe_router_load_balancing_type", "none")
    if kind not in _BALANCING_TYPES:
        # Core's others count by the padded batch or by the micro-batches so far, and would depend on the packing.
        key = "model.transformer_config.moe_router_load_balancing_type"
        refuse(key, kind, ", ".join(_BALANCING_TYPES) + ": micro-batches hold several sequences, in any order")
    if kind == "none" and fields.get("moe_aux_loss_coeff"):
        key = "model.transformer_config.moe_aux_loss_coeff"
        refuse(key, fields["moe_aux_loss_coeff"], "0 without moe_router_load_balancing_type aux_loss")


def _check_recorded_routes(config: Config) -> None:
    if not config.rollout.record_routes:
        return
    if not config.model.moe_routing_replay:
        refuse("rollout.record_routes", True, "false without model.moe_routing_replay, which follows the routes")
    if config.rollout.placement is EnginePlacement.disaggregated:
        refuse("rollout.record_routes", True, "false with rollout.placement=disaggregated")
    if not config.rollout.enforce_eager:
        refuse("rollout.record_routes", True, "false without rollout.enforce_eager: graphs do not tell their routes")
