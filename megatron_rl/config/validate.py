"""What a configuration may not be, decided before any process starts. Pure but for reading files; no torch.

    validate = check_values   numbers and their combinations, from the configuration alone
             + check_model    the layout against the sizes in the checkpoint's config.json
             + check_files    the checkpoint's weights and tokenizer, the data files

The first mistake is raised, as one line with the key, what was given and what is allowed. What needs a tokenizer (rows
of the data) or user code (rewards) is checked where it is loaded.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_rl.config.algorithm import check_algorithm, check_checkpoints
from megatron_rl.config.errors import ConfigError
from megatron_rl.config.hf_checkpoint import (
    SUPPORTED_ARCHITECTURES,
    ModelShape,
    check_tokenizer,
    check_weights,
    read_json_object,
    read_model_shape,
)
from megatron_rl.config.load import shown
from megatron_rl.config.numerics import check_fp8_shapes, check_numerics
from megatron_rl.config.pipeline import layers_of_stages
from megatron_rl.config.ranges import check_ranges
from megatron_rl.config.schema import (
    Aggregation,
    Config,
    EnginePlacement,
    LRDecayStyle,
    ParallelConfig,
    Recipe,
    SyncTransport,
)

_BIASED_EXPERTS = ("GptOssForCausalLM",)
"""Core adds an expert's bias on every rank that holds a part of the expert."""
_DATA_FORMATS = ("jsonl", "parquet", "gsm8k")
_BALANCING_TYPES = ("none", "aux_loss")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# Fields of TransformerConfig and of vLLM's engine that a key of ours decides: set twice, they could disagree.
_OWN_KEY_OF_TRANSFORMER_FIELD = {
    "params_dtype": "model.params_dtype",
    "batch_invariant_mode": "model.batch_invariant_mode",
    "fp8": "model.fp8",
    "fp8_recipe": "model.fp8_recipe",
    "fp8_param": "model.fp8_param",
    "first_last_layers_bf16": "model.first_last_layers_bf16",
    "num_layers_at_start_in_bf16": "model.num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16": "model.num_layers_at_end_in_bf16",
    "moe_enable_routing_replay": "model.moe_routing_replay",
    "recompute_granularity": "model.recompute_granularity",
    "recompute_method": "model.recompute_method",
    "recompute_num_layers": "model.recompute_num_layers",
    "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "sequence_parallel": "parallel.sequence_parallel",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage": "parallel.num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage": "parallel.num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split": "parallel.account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split": "parallel.account_for_loss_in_pipeline_split",
    "context_parallel_size": "parallel.context_parallel_size",
    "expert_model_parallel_size": "parallel.expert_model_parallel_size",
    "expert_tensor_parallel_size": "parallel.expert_tensor_parallel_size",
}
_OWN_KEY_OF_ENGINE_ARGUMENT = {
    "model": "model.hf_path",
    "dtype": "model.params_dtype",
    "seed": "seed",
    "quantization": "rollout.quantization",
    "tensor_parallel_size": "rollout.tensor_model_parallel_size",
    "max_model_len": "rollout.max_model_len",
    "max_num_seqs": "rollout.max_num_seqs",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "kv_cache_memory_bytes": "rollout.kv_cache_gigabytes",
    "enforce_eager": "rollout.enforce_eager",
}


def validate(
    config: Config,
    *,
    world_size: int | None,
    evaluates: bool = False,
    architectures: Sequence[str] = SUPPORTED_ARCHITECTURES,
) -> None:
    """Raise for the first mistake in a configuration.

    Args:
        config: as loaded.
        world_size: number of ranks that were started; None if they are yet to be started as the layout says.
        evaluates: whether it is to be evaluated and not trained; then an SFT run generates too.
        architectures: the model architectures that can be trained, as config.json names them.

    Raises:
        ConfigError: one line with the dotted key, what was given and what is allowed.
    """
    generates = evaluates or config.recipe is Recipe.rl
    check_values(config, world_size=world_size, generates=generates)
    shape = read_model_shape(Path(config.model.hf_path))
    check_model(config, shape, generates=generates, architectures=architectures)
    check_files(config)
    if generates:
        _check_stored_form(Path(config.model.hf_path))


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


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt + response that is trained on."""
    return config.data.max_prompt_tokens + config.rollout.sampling.max_response_tokens


def check_values(config: Config, *, world_size: int | None, generates: bool) -> None:
    """All that the configuration alone decides; `generates` is whether the run needs engines."""
    check_ranges(config)
    for key, name in (("name", config.name), ("evaluation.name", config.evaluation.name)):
        if not _FOLDER_NAME.fullmatch(name):
            _refuse(key, name, "letters, digits, '.', '_' and '-', the first a letter or digit")
    if config.optimizer.lr_decay_style is LRDecayStyle.exponential and not config.optimizer.min_lr:
        _refuse("optimizer.min_lr", config.optimizer.min_lr, "above 0 with lr_decay_style exponential")
    check_numerics(config)
    _check_recompute(config)
    _check_free_form(config)
    _check_checkpoint(config)
    _check_slurm(config)
    _check_data(config)
    _check_layout(config, world_size)
    _check_batches(config, world_size)
    if generates:
        _check_rollout(config, world_size)


def check_model(
    config: Config,
    shape: ModelShape,
    *,
    generates: bool,
    architectures: Sequence[str] = SUPPORTED_ARCHITECTURES,
) -> None:
    """The layout and the lengths against the model's sizes."""
    if shape.architecture not in architectures:
        _refuse("model.hf_path", f"architecture {shape.architecture}", ", ".join(architectures))
    tp = config.parallel.tensor_model_parallel_size
    _check_heads("parallel.tensor_model_parallel_size", tp, shape)
    if shape.intermediate_size % tp:
        _refuse("parallel.tensor_model_parallel_size", tp, f"a divisor of intermediate_size {shape.intermediate_size}")
    _check_experts(config, shape)
    stages = layers_of_stages(config.parallel, shape.num_hidden_layers)
    stage_layers = min(min(chunks) for chunks in stages)
    check_fp8_shapes(config, shape)
    if (config.model.recompute_num_layers or 0) > stage_layers:
        _refuse(
            "model.recompute_num_layers", config.model.recompute_num_layers, f"[1, {stage_layers}], a stage's layers"
        )
    limit = f"at most {shape.max_position_embeddings}, the model's max_position_embeddings"
    if longest_sequence(config) > shape.max_position_embeddings:
        _refuse("data.max_prompt_tokens + rollout.sampling.max_response_tokens", longest_sequence(config), limit)
    if generates:
        _check_heads("rollout.tensor_model_parallel_size", config.rollout.tensor_model_parallel_size, shape)
        if (config.rollout.max_model_len or 0) > shape.max_position_embeddings:
            _refuse("rollout.max_model_len", config.rollout.max_model_len, limit)


def check_files(config: Config) -> None:
    """Files that must exist before a rank is worth starting."""
    folder = Path(config.model.hf_path)
    check_tokenizer(folder)
    if config.model.load_weights:
        check_weights(folder)
    check_checkpoints(config)
    for key, file in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if file is not None and not Path(file).is_file():
            _refuse(key, file, "an existing file")


def _check_balancing(config: Config) -> None:
    fields = config.model.transformer_config
    kind = fields.get("moe_router_load_balancing_type", "none")
    if kind not in _BALANCING_TYPES:
        # Core's others count by the padded batch or by the micro-batches so far, and would depend on the packing.
        key = "model.transformer_config.moe_router_load_balancing_type"
        _refuse(key, kind, ", ".join(_BALANCING_TYPES) + ": rows hold several sequences, in any order")
    if kind == "none" and fields.get("moe_aux_loss_coeff"):
        key = "model.transformer_config.moe_aux_loss_coeff"
        _refuse(key, fields["moe_aux_loss_coeff"], "0 without moe_router_load_balancing_type aux_loss")


def _check_recorded_routes(config: Config) -> None:
    if not config.rollout.record_routes:
        return
    if not config.model.moe_routing_replay:
        _refuse("rollout.record_routes", True, "false without model.moe_routing_replay, which follows the routes")
    if config.rollout.placement is EnginePlacement.disaggregated:
        _refuse("rollout.record_routes", True, "false with rollout.placement=disaggregated")
    if not config.rollout.enforce_eager:
        _refuse("rollout.record_routes", True, "false without rollout.enforce_eager: graphs do not tell their routes")


def _check_stored_form(folder: Path) -> None:
    """An engine keeps quantised weights as they are stored, and could not take the policy's, which are not."""
    quantized = read_json_object(folder / "config.json", "model.hf_path").get("quantization_config")
    if quantized:
        allowed = "one that is not, such as `megatron-rl convert` makes of it, to Megatron and back"
        given = f"'{folder}', whose weights are quantised ({quantized.get('quant_method')})"
        raise ConfigError(f"model.hf_path: given {given}, allowed: {allowed}")


def _check_experts(config: Config, shape: ModelShape) -> None:
    parallel = config.parallel
    _check_balancing(config)
    _check_recorded_routes(config)
    if config.model.moe_routing_replay:
        if not shape.num_experts:
            _refuse("model.moe_routing_replay", True, "false for a model without experts")
        if config.model.recompute_granularity == "full" and parallel.pipeline_model_parallel_size > 1:
            # The backward pass chooses anew, of a row that another one has followed by then.
            _refuse("model.moe_routing_replay", True, "false with recompute_granularity full in a pipeline")
    if not shape.num_experts:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(parallel, name) not in (None, 1):
                _refuse(f"parallel.{name}", getattr(parallel, name), "1 for a model without experts")
        return
    _check_split_of_experts(parallel, shape)
    if shape.num_experts % parallel.expert_model_parallel_size:
        key = "parallel.expert_model_parallel_size"
        _refuse(key, parallel.expert_model_parallel_size, f"a divisor of the model's {shape.num_experts} experts")
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        _refuse("parallel.sequence_parallel", False, "true for a model with experts and tensor_model_parallel_size > 1")


def _check_split_of_experts(parallel: ParallelConfig, shape: ModelShape) -> None:
    key, parts = "parallel.expert_tensor_parallel_size", parallel.expert_tensor_parallel_size
    if parts is None:
        parts = parallel.tensor_model_parallel_size
    if parts > 1 and shape.architecture in _BIASED_EXPERTS:
        _refuse(
            key,
            parts,
            f"1 for {shape.architecture}, whose experts have biases; they are spread by "
            "parallel.expert_model_parallel_size",
        )
    if shape.expert_intermediate_size % parts:
        _refuse(key, parts, f"a divisor of the {shape.expert_intermediate_size} channels of an expert")


def _check_heads(key: str, ranks: int, shape: ModelShape) -> None:
    if shape.num_attention_heads % ranks:
        _refuse(key, ranks, f"a divisor of the model's {shape.num_attention_heads} attention heads")
    if shape.num_key_value_heads % ranks and ranks % shape.num_key_value_heads:
        _refuse(key, ranks, f"a divisor or a multiple of the model's {shape.num_key_value_heads} key-value heads")


def _check_recompute(config: Config) -> None:
    model = config.model
    if model.recompute_granularity not in (None, "selective", "full"):
        _refuse("model.recompute_granularity", model.recompute_granularity, "null, selective, full")
    if model.recompute_granularity == "full":
        if model.recompute_method not in ("uniform", "block"):
            _refuse("model.recompute_method", model.recompute_method, "uniform, block with recompute_granularity full")
        if model.recompute_num_layers is None:
            _refuse("model.recompute_num_layers", None, "[1, inf) with recompute_granularity full")
        return
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(model, name) is not None:
            _refuse(f"model.{name}", getattr(model, name), "null without model.recompute_granularity=full")


def _check_free_form(config: Config) -> None:
    for section, given, owners in (
        ("model.transformer_config", config.model.transformer_config, _OWN_KEY_OF_TRANSFORMER_FIELD),
        ("rollout.engine_args", config.rollout.engine_args, _OWN_KEY_OF_ENGINE_ARGUMENT),
    ):
        for name in given:
            if name in owners:
                _refuse(f"{section}.{name}", given[name], f"only by {owners[name]}")


def _check_checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    if checkpoint.keep_best and checkpoint.keep_last is None:
        _refuse("checkpoint.keep_best", checkpoint.keep_best, "0 without checkpoint.keep_last, which keeps all")
    if checkpoint.keep_best and not checkpoint.best_metric:
        _refuse("checkpoint.best_metric", checkpoint.best_metric, "the name of a metric with checkpoint.keep_best")


def _check_slurm(config: Config) -> None:
    if config.slurm.container_runtime not in ("pyxis", "apptainer"):
        _refuse("slurm.container_runtime", config.slurm.container_runtime, "pyxis, apptainer")


def _check_data(config: Config) -> None:
    data = config.data
    if data.format not in _DATA_FORMATS:
        _refuse("data.format", data.format, ", ".join(_DATA_FORMATS))
    if data.train is None:
        _refuse("data.train", None, "a file")
    if config.evaluation.interval > 0 and data.eval is None:
        _refuse("evaluation.interval", config.evaluation.interval, "0 without data.eval")


def _check_layout(config: Config, world_size: int | None) -> None:
    data_parallel_size(config.parallel, world_size)
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        _refuse("parallel.sequence_parallel", True, "true only with parallel.tensor_model_parallel_size > 1")
    vpp = parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and parallel.pipeline_model_parallel_size == 1:
        _refuse("parallel.virtual_pipeline_model_parallel_size", vpp, "null without pipeline_model_parallel_size > 1")
    expert_tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * expert_tensor
    stage_ranks = _num_ranks(config, world_size) // parallel.pipeline_model_parallel_size
    if stage_ranks % expert_ranks:
        _refuse(
            "parallel.expert_model_parallel_size x expert_tensor_parallel_size",
            expert_ranks,
            f"a divisor of the {stage_ranks} ranks of a pipeline stage",
        )


def _check_batches(config: Config, world_size: int | None) -> None:
    train, rollout, optimizer = config.train, config.rollout, config.optimizer
    num_updates = train.num_steps
    check_algorithm(config)
    if config.recipe is Recipe.rl:
        num_engines = number_of_engines(config, _num_ranks(config, world_size))
        if rollout.num_prompts_per_step < num_engines:
            _refuse(
                "rollout.num_prompts_per_step", rollout.num_prompts_per_step, f"at least {num_engines}, one per engine"
            )
        num_samples = rollout.num_prompts_per_step * rollout.num_samples_per_prompt
        batch_size = train.global_batch_size or num_samples
        if num_samples % batch_size:
            _refuse("train.global_batch_size", batch_size, f"a divisor of the {num_samples} samples of a rollout step")
        num_updates *= train.num_epochs_per_step * (num_samples // batch_size)
    elif train.global_batch_size is None:
        _refuse("train.global_batch_size", None, f"[1, inf) with recipe {config.recipe.value}")
    replicas = data_parallel_size(config.parallel, world_size)
    if train.global_batch_size is not None and train.global_batch_size < replicas:
        _refuse("train.global_batch_size", train.global_batch_size, f"at least {replicas}, one per replica")
    decay_steps = optimizer.lr_decay_steps or num_updates
    if optimizer.lr_warmup_steps >= decay_steps and optimizer.lr_warmup_steps > 0:
        _refuse(
            "optimizer.lr_warmup_steps", optimizer.lr_warmup_steps, f"less than the {decay_steps} steps of the schedule"
        )
    decay_end = optimizer.end_weight_decay
    if decay_end is not None and decay_end < optimizer.weight_decay:
        _refuse("optimizer.end_weight_decay", decay_end, f"at least optimizer.weight_decay {optimizer.weight_decay}")
    if optimizer.min_lr > optimizer.lr:
        _refuse("optimizer.min_lr", optimizer.min_lr, f"at most optimizer.lr {optimizer.lr}")
    algorithm = config.algorithm
    if algorithm.token_sum_norm is not None and algorithm.aggregation is not Aggregation.token_sum_norm:
        _refuse(
            "algorithm.token_sum_norm", algorithm.token_sum_norm, "null unless algorithm.aggregation=token_sum_norm"
        )


def _check_rollout(config: Config, world_size: int | None) -> None:
    rollout, evaluation = config.rollout, config.evaluation
    num_ranks = _num_ranks(config, world_size)
    if rollout.placement is EnginePlacement.disaggregated:
        if rollout.num_engines > num_ranks:
            _refuse("rollout.num_engines", rollout.num_engines, f"at most {num_ranks}, one per training rank")
        if rollout.quantization is not None:
            _refuse("rollout.quantization", rollout.quantization.value, "null with rollout.placement=disaggregated")
        if config.model.batch_invariant_mode:
            _refuse("model.batch_invariant_mode", True, "false with rollout.placement=disaggregated")
        if config.sync.delta and config.sync.transport is SyncTransport.process_group:
            _refuse(
                "sync.delta", config.sync.delta, "0 with sync.transport=process_group, whose messages have one length"
            )
    elif config.sync.delta:
        _refuse("sync.delta", config.sync.delta, "0 without rollout.placement=disaggregated")
    elif num_ranks % rollout.tensor_model_parallel_size:
        key = "rollout.tensor_model_parallel_size"
        _refuse(key, rollout.tensor_model_parallel_size, f"a divisor of the {num_ranks} ranks")
    needed = longest_sequence(config)
    if rollout.max_model_len is not None and rollout.max_model_len < needed:
        parts = "data.max_prompt_tokens + rollout.sampling.max_response_tokens"
        _refuse("rollout.max_model_len", rollout.max_model_len, f"at least {needed} = {parts}")
    if "" in rollout.sampling.stop:
        _refuse("rollout.sampling.stop", rollout.sampling.stop, "strings that are not empty")
    if evaluation.num_samples_per_prompt > 1 and evaluation.temperature == 0:
        _refuse(
            "evaluation.num_samples_per_prompt", evaluation.num_samples_per_prompt, "1 with evaluation.temperature 0"
        )
    rewards = [function.name for function in config.rewards.functions]
    if not rewards:
        _refuse("rewards.functions", [], "at least one reward, to score completions")
    if evaluation.correct_reward is not None and evaluation.correct_reward not in rewards:
        _refuse("evaluation.correct_reward", evaluation.correct_reward, ", ".join(rewards))


def _num_ranks(config: Config, world_size: int | None) -> int:
    parallel = config.parallel
    return replica_ranks(parallel) * data_parallel_size(parallel, world_size)


def _refuse(key: str, given: object, allowed: str) -> NoReturn:
    raise ConfigError(f"{key}: given {shown(given)}, allowed: {allowed}")
