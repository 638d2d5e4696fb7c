"""What a layout needs on each rank: bytes of weights, gradients, optimizer and activations, the pipeline's bubble.

Weights, gradients and optimizer state follow from the shards alone and are exact but for the alignment of buffers:

    weights     2 (bfloat16) or 4 bytes per parameter of the rank
    gradients   4 bytes: they are accumulated in float32
    optimizer   8 bytes of Adam's moments, and 4 of a float32 copy beside bfloat16 weights; the distributed optimizer
                divides them by the ranks with the same parameters: data x context, for experts the expert-data ranks

Activations are an estimate: what the layers keep for the backward pass of the micro-batches in flight, with attention
that keeps no scores. Transformer Engine's fused layers keep what Korthikanti et al. 2022, arXiv:2205.05198, section 4.1
count, here with the shapes of gated and grouped layers and without masks of dropout. The portable layers keep more,
because each of torch's operations keeps its own; their numbers were counted tensor by tensor and agree with what
training keeps. `model.layer_spec: auto` is planned as Transformer Engine's, which a GPU cluster has.

The bubble is (p - 1) / (v m) of the time of the m micro-batches, for p stages of v chunks (Narayanan et al. 2021,
arXiv:2104.04473, section 2.2).
"""

from dataclasses import dataclass

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import Config, Dtype, LayerSpec, ParallelConfig
from megatron_rl.config.world import layers_of_stages
from megatron_rl.placement.layout import Layout
from megatron_rl.placement.sizes import LayerSizes, ModelSizes

GIGABYTE = 1e9


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage."""

    parameters: int
    """Number of them, not bytes."""
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """A layout, and what it needs."""

    layout: Layout
    sizes: ModelSizes
    stages: tuple[StageMemory, ...]
    num_micro_batches: int
    """Of an optimizer step, on each data-parallel rank, if rows are as full as micro_batch_tokens allows."""
    bubble: float
    """Idle part of the pipeline's time."""
    cache_bytes_per_token: int
    """Of the key-value cache, on a rank of an engine."""
    engine_weights: int
    """Bytes on a rank of an engine."""

    @property
    def largest(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)


def plan(config: Config, sizes: ModelSizes, layout: Layout, *, tokens_per_step: int) -> Plan:
    """What a validated configuration needs.

    Args:
        config: validated.
        sizes: of the model, for the layout's tensor- and expert-tensor-parallel sizes.
        layout: of the training ranks.
        tokens_per_step: tokens of an optimizer step over all ranks.

    Raises:
        ConfigError: the layers cannot be split so.
    """
    parallel, pp = config.parallel, layout.pipeline_model_parallel_size
    per_rank = -(-tokens_per_step // layout.data_parallel_size)
    rows = max(1, -(-per_rank // config.train.micro_batch_tokens))
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    if chunks > 1:
        rows += -rows % pp
    wide = 2 if config.model.params_dtype is Dtype.bfloat16 else 4
    engine_ranks = layout.engine_size
    cache_ranks = 1 if sizes.cache_is_latent else min(engine_ranks, sizes.kv_heads)
    return Plan(
        layout=layout,
        sizes=sizes,
        stages=tuple(_stage(config, sizes, layout, stage, rows) for stage in range(pp)),
        num_micro_batches=rows,
        bubble=(pp - 1) / (chunks * rows + pp - 1),
        cache_bytes_per_token=wide * len(sizes.layers) * sizes.cached // cache_ranks,
        engine_weights=wide * sizes.parameters // engine_ranks,
    )


def _stage(config: Config, sizes: ModelSizes, layout: Layout, stage: int, rows: int) -> StageMemory:
    layers = _layers_of(config.parallel, sizes, stage)
    pp = layout.pipeline_model_parallel_size
    first, last = stage == 0, stage == pp - 1
    dense = sum(layer.dense_on_rank for layer in layers)
    local_experts = sizes.num_experts // layout.expert_model_parallel_size
    expert = sum(local_experts * layer.expert_on_rank for layer in layers)
    if first:
        dense += sizes.embedding_on_rank
    if last:
        dense += sizes.final_norm + sizes.output_on_rank
        if not sizes.output and not first:
            dense += sizes.embedding_on_rank  # the last stage's copy of a tied embedding
    bf16 = config.model.params_dtype is Dtype.bfloat16
    state = 12 if bf16 else 8
    shared_by = (layout.data_parallel_size * layout.context_parallel_size, layout.expert_data_parallel_size)
    if not config.optimizer.use_distributed_optimizer:
        shared_by = (1, 1)
    return StageMemory(
        parameters=dense + expert,
        weights=(2 if bf16 else 4) * (dense + expert),
        gradients=4 * (dense + expert),
        optimizer=state * -(-dense // shared_by[0]) + state * -(-expert // shared_by[1]),
        activations=_activations(config, sizes, layout, layers, stage, rows),
    )


def _layers_of(parallel: ParallelConfig, sizes: ModelSizes, stage: int) -> list[LayerSizes]:
    counts = layers_of_stages(parallel, len(sizes.layers))
    layers: list[LayerSizes] = []
    begin = 0
    for chunk in range(len(counts[0])):
        for other, of_stage in enumerate(counts):
            if other == stage:
                layers += sizes.layers[begin : begin + of_stage[chunk]]
            begin += of_stage[chunk]
    return layers


def _activations(
    config: Config, sizes: ModelSizes, layout: Layout, layers: list[LayerSizes], stage: int, rows: int
) -> int:
    """Bytes that a stage keeps for the backward passes of the rows in flight, with full rows."""
    parallel = config.parallel
    wide = 2 if config.model.params_dtype is Dtype.bfloat16 else 4
    tokens = config.train.micro_batch_tokens / layout.context_parallel_size
    hidden = sizes.hidden / (layout.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    kept = [_kept(config, sizes, layout, layer, hidden) for layer in layers]
    pp, chunks = layout.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    in_flight = min(rows, pp - stage) if chunks == 1 else min(rows, (pp * (chunks + 1) - 1) / chunks)
    if config.model.recompute_granularity == "full":
        per_unit = config.model.recompute_num_layers or 1
        elements = in_flight * hidden * len(layers) / per_unit + max(kept, default=0.0) * per_unit
    else:
        elements = in_flight * sum(kept)
    if stage == pp - 1:
        elements += hidden  # the head's input; it keeps no logits beyond a chunk of tokens
    return int(wide * tokens * elements)


def _kept(config: Config, sizes: ModelSizes, layout: Layout, layer: LayerSizes, hidden: float) -> float:
    """Elements that a layer keeps for one token of a rank's part of a row.

    `hidden` is the rank's share of the hidden channels outside of the parts that tensor parallelism splits.
    """
    portable = config.model.layer_spec is LayerSpec.portable
    tp = layout.tensor_model_parallel_size
    keys, values = sizes.key_channels, sizes.value_channels
    # Queries and what attention gives, which the portable layers copy for the projection; keys and values.
    attention = sizes.heads * (keys + values * (2 if portable else 1)) + sizes.kv_heads * (keys + values)
    if portable and sizes.query_key_norm:
        attention += 3 * (sizes.heads + sizes.kv_heads) * keys  # before, inside and after the norm
    # Inputs of both norms, of the projections and of the MLP; torch's RMSNorm also keeps what it scaled.
    outside = (6 if portable and sizes.rms_norm else 4) * hidden
    if portable:
        outside += 4 * keys  # cosines and sines
    # A gated MLP: both halves and their product; torch also keeps the activation and its derivative.
    inner = ((5 if portable else 3) if sizes.gated else 2) * (sizes.shared_ffn if layer.expert else sizes.ffn)
    elements = outside + (attention + inner) / tp
    if layer.expert:
        etp = layout.expert_tensor_parallel_size or tp
        # Each token is sent to topk experts; with even routing a rank receives as many as it sends.
        sent = sizes.topk / (tp if config.parallel.sequence_parallel else 1) * etp
        channels = ((6 if portable else 3) if sizes.gated else 2) * sizes.expert_ffn / etp
        elements += sent * ((1 if portable else 2) * sizes.hidden + channels)
    return elements


def check_memory(needed: Plan, config: Config, *, gpu_gigabytes: float) -> None:
    """Refuse what cannot fit a GPU of so many gigabytes, naming what would help.

    Raises:
        ConfigError: one line with the bytes and the remedy.
    """
    stage, room = needed.largest, gpu_gigabytes * GIGABYTE
    state = stage.weights + stage.gradients + stage.optimizer
    if state > room:
        remedy = "more tensor_model_parallel_size or pipeline_model_parallel_size"
        if needed.sizes.num_experts and needed.layout.expert_model_parallel_size < needed.sizes.num_experts:
            remedy = "more expert_model_parallel_size or pipeline_model_parallel_size"
        if not config.optimizer.use_distributed_optimizer:
            remedy = "optimizer.use_distributed_optimizer=true, or " + remedy
        raise ConfigError(
            f"parallel: weights, gradients and optimizer need {state / GIGABYTE:.1f} GB on a rank of "
            f"{gpu_gigabytes:g} GB; remedy: {remedy}"
        )
    if stage.total > room:
        remedy = "less train.micro_batch_tokens or more context_parallel_size"
        if config.model.recompute_granularity != "full":
            remedy = "model.recompute_granularity=full, " + remedy
        raise ConfigError(
            f"train.micro_batch_tokens: activations of {config.train.micro_batch_tokens} tokens need "
            f"{stage.activations / GIGABYTE:.1f} GB beside {state / GIGABYTE:.1f} GB of state, on a rank of "
            f"{gpu_gigabytes:g} GB; remedy: {remedy}"
        )
    engine = config.rollout.gpu_memory_utilization * room
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens
    if needed.engine_weights + longest * needed.cache_bytes_per_token > engine:
        raise ConfigError(
            f"rollout.tensor_model_parallel_size: an engine's rank needs {needed.engine_weights / GIGABYTE:.1f} GB of "
            f"weights and {longest * needed.cache_bytes_per_token / GIGABYTE:.2f} GB of cache for one sequence, of "
            f"{engine / GIGABYTE:.1f} GB; remedy: a larger rollout.tensor_model_parallel_size"
        )
