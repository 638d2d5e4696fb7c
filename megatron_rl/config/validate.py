"""Whether a configuration can run, decided before any process starts. Pure but for reading files; no torch.

    validate = check_values   numbers and their combinations, from the configuration alone
             + check_model    the layout against the sizes in the checkpoint's config.json
             + check_files    the checkpoint's weights and tokenizer, the data files

The first mistake is raised, as one line with the key, what was given and what is allowed. Among them are fields of
TransformerConfig and of vLLM's engine that a key of ours decides: set twice, they could disagree. What needs a
tokenizer (rows of the data) or user code (rewards) is checked where it is loaded.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.algorithm import check_algorithm, check_checkpoints
from megatron_rl.config.errors import ConfigError, refuse
from megatron_rl.config.hf_checkpoint import (
    SUPPORTED_ARCHITECTURES,
    ModelShape,
    check_tokenizer,
    check_weights,
    read_json_object,
    read_model_shape,
)
from megatron_rl.config.numerics import check_fp8_shapes, check_numerics
from megatron_rl.config.ranges import check_ranges
from megatron_rl.config.schema import (
    Aggregation,
    Config,
    EnginePlacement,
    LRDecayStyle,
    Recipe,
    SyncTransport,
)
from megatron_rl.config.world import (
    check_experts,
    data_parallel_size,
    layers_of_stages,
    longest_sequence,
    num_ranks,
    number_of_engines,
)

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


def check_free_form(config: Config) -> None:
    """Raise ConfigError for a field of Megatron's or argument of vLLM's that a key of ours decides."""
    for section, given, owners in (
        ("model.transformer_config", config.model.transformer_config, _OWN_KEY_OF_TRANSFORMER_FIELD),
        ("rollout.engine_args", config.rollout.engine_args, _OWN_KEY_OF_ENGINE_ARGUMENT),
    ):
        for name in given:
            if name in owners:
                refuse(f"{section}.{name}", given[name], f"only by {owners[name]}")


_DATA_FORMATS = ("jsonl", "parquet", "gsm8k")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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


def check_values(config: Config, *, world_size: int | None, generates: bool) -> None:
    """All that the configuration alone decides; `generates` is whether the run needs engines."""
    check_ranges(config)
    for key, name in (("name", config.name), ("evaluation.name", config.evaluation.name)):
        if not _FOLDER_NAME.fullmatch(name):
            refuse(key, name, "letters, digits, '.', '_' and '-', the first a letter or digit")
    if config.optimizer.lr_decay_style is LRDecayStyle.exponential and not config.optimizer.min_lr:
        refuse("optimizer.min_lr", config.optimizer.min_lr, "above 0 with lr_decay_style exponential")
    check_numerics(config)
    _check_recompute(config)
    check_free_form(config)
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
        refuse("model.hf_path", f"architecture {shape.architecture}", ", ".join(architectures))
    tp = config.parallel.tensor_model_parallel_size
    _check_heads("parallel.tensor_model_parallel_size", tp, shape)
    if shape.intermediate_size % tp:
        refuse("parallel.tensor_model_parallel_size", tp, f"a divisor of intermediate_size {shape.intermediate_size}")
    check_experts(config, shape)
    stages = layers_of_stages(config.parallel, shape.num_hidden_layers)
    stage_layers = min(min(chunks) for chunks in stages)
    check_fp8_shapes(config, shape)
    if (config.model.recompute_num_layers or 0) > stage_layers:
        refuse(
            "model.recompute_num_layers", config.model.recompute_num_layers, f"[1, {stage_layers}], a stage's layers"
        )
    limit = f"at most {shape.max_position_embeddings}, the model's max_position_embeddings"
    if longest_sequence(config) > shape.max_position_embeddings:
        refuse("data.max_prompt_tokens + rollout.sampling.max_response_tokens", longest_sequence(config), limit)
    if generates:
        key, engine_tp = "rollout.tensor_model_parallel_size", config.rollout.tensor_model_parallel_size
        _check_heads(key, engine_tp, shape)
        if shape.architecture in _NO_HEAD_TWICE and engine_tp > shape.num_key_value_heads:
            allowed = f"at most {shape.num_key_value_heads}, the key-value heads, which vLLM's {shape.architecture}"
            refuse(key, engine_tp, f"{allowed} cannot hold twice")
        if (config.rollout.max_model_len or 0) > shape.max_position_embeddings:
            refuse("rollout.max_model_len", config.rollout.max_model_len, limit)


def check_files(config: Config) -> None:
    """Files that must exist before a rank is worth starting."""
    folder = Path(config.model.hf_path)
    check_tokenizer(folder)
    if config.model.load_weights:
        check_weights(folder)
    check_checkpoints(config)
    for key, file in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if file is not None and not Path(file).is_file():
            refuse(key, file, "an existing file")


def _check_stored_form(folder: Path) -> None:
    """An engine keeps quantised weights as they are stored, and could not take the policy's, which are not."""
    quantized = read_json_object(folder / "config.json", "model.hf_path").get("quantization_config")
    if quantized:
        allowed = "one that is not, such as `megatron-rl convert` makes of it, to Megatron and back"
        given = f"'{folder}', whose weights are quantised ({quantized.get('quant_method')})"
        raise ConfigError(f"model.hf_path: given {given}, allowed: {allowed}")


_NO_HEAD_TWICE = ("GptOssForCausalLM",)
"""Architectures whose model in vLLM divides key-value heads among ranks and gives none to several."""


def _check_heads(key: str, ranks: int, shape: ModelShape) -> None:
    if shape.num_attention_heads % ranks:
        refuse(key, ranks, f"a divisor of the model's {shape.num_attention_heads} attention heads")
    if shape.num_key_value_heads % ranks and ranks % shape.num_key_value_heads:
        refuse(key, ranks, f"a divisor or a multiple of the model's {shape.num_key_value_heads} key-value heads")


def _check_recompute(config: Config) -> None:
    model = config.model
    if model.recompute_granularity not in (None, "selective", "full"):
        refuse("model.recompute_granularity", model.recompute_granularity, "null, selective, full")
    if model.recompute_granularity == "full":
        if model.recompute_method not in ("uniform", "block"):
            refuse("model.recompute_method", model.recompute_method, "uniform, block with recompute_granularity full")
        if model.recompute_num_layers is None:
            refuse("model.recompute_num_layers", None, "[1, inf) with recompute_granularity full")
        return
    for name in ("recompute_method", "recompute_num_layers"):
        if getattr(model, name) is not None:
            refuse(f"model.{name}", getattr(model, name), "null without model.recompute_granularity=full")


def _check_checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    if checkpoint.keep_best and checkpoint.keep_last is None:
        refuse("checkpoint.keep_best", checkpoint.keep_best, "0 without checkpoint.keep_last, which keeps all")
    if checkpoint.keep_best and not checkpoint.best_metric:
        refuse("checkpoint.best_metric", checkpoint.best_metric, "the name of a metric with checkpoint.keep_best")


def _check_slurm(config: Config) -> None:
    if config.slurm.container_runtime not in ("pyxis", "apptainer"):
        refuse("slurm.container_runtime", config.slurm.container_runtime, "pyxis, apptainer")


def _check_data(config: Config) -> None:
    data = config.data
    if data.format not in _DATA_FORMATS:
        refuse("data.format", data.format, ", ".join(_DATA_FORMATS))
    if data.train is None:
        refuse("data.train", None, "a file")
    if config.evaluation.interval > 0 and data.eval is None:
        refuse("evaluation.interval", config.evaluation.interval, "0 without data.eval")


def _check_layout(config: Config, world_size: int | None) -> None:
    data_parallel_size(config.parallel, world_size)
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        refuse("parallel.sequence_parallel", True, "true only with parallel.tensor_model_parallel_size > 1")
    vpp = parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and parallel.pipeline_model_parallel_size == 1:
        refuse("parallel.virtual_pipeline_model_parallel_size", vpp, "null without pipeline_model_parallel_size > 1")
    expert_tensor = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * expert_tensor
    stage_ranks = num_ranks(config, world_size) // parallel.pipeline_model_parallel_size
    if stage_ranks % expert_ranks:
        refuse(
            "parallel.expert_model_parallel_size x expert_tensor_parallel_size",
            expert_ranks,
            f"a divisor of the {stage_ranks} ranks of a pipeline stage",
        )


def _check_batches(config: Config, world_size: int | None) -> None:
    train, rollout, optimizer = config.train, config.rollout, config.optimizer
    num_updates = train.num_steps
    check_algorithm(config)
    if config.recipe is Recipe.rl:
        num_engines = number_of_engines(config, num_ranks(config, world_size))
        if rollout.num_prompts_per_step < num_engines:
            refuse(
                "rollout.num_prompts_per_step", rollout.num_prompts_per_step, f"at least {num_engines}, one per engine"
            )
        num_samples = rollout.num_prompts_per_step * rollout.num_samples_per_prompt
        batch_size = train.global_batch_size or num_samples
        if num_samples % batch_size:
            refuse("train.global_batch_size", batch_size, f"a divisor of the {num_samples} samples of a rollout step")
        num_updates *= train.num_epochs_per_step * (num_samples // batch_size)
    elif train.global_batch_size is None:
        refuse("train.global_batch_size", None, f"[1, inf) with recipe {config.recipe.value}")
    replicas = data_parallel_size(config.parallel, world_size)
    if train.global_batch_size is not None and train.global_batch_size < replicas:
        refuse("train.global_batch_size", train.global_batch_size, f"at least {replicas}, one per replica")
    decay_steps = optimizer.lr_decay_steps or num_updates
    if optimizer.lr_warmup_steps >= decay_steps and optimizer.lr_warmup_steps > 0:
        refuse(
            "optimizer.lr_warmup_steps", optimizer.lr_warmup_steps, f"less than the {decay_steps} steps of the schedule"
        )
    decay_end = optimizer.end_weight_decay
    if decay_end is not None and decay_end < optimizer.weight_decay:
        refuse("optimizer.end_weight_decay", decay_end, f"at least optimizer.weight_decay {optimizer.weight_decay}")
    if optimizer.min_lr > optimizer.lr:
        refuse("optimizer.min_lr", optimizer.min_lr, f"at most optimizer.lr {optimizer.lr}")
    algorithm = config.algorithm
    if algorithm.token_sum_norm is not None and algorithm.aggregation is not Aggregation.token_sum_norm:
        refuse("algorithm.token_sum_norm", algorithm.token_sum_norm, "null unless algorithm.aggregation=token_sum_norm")


def _check_limits(config: Config) -> None:
    """Limits that would end a run whose engines are within theirs."""
    collective_minutes = config.parallel.distributed_timeout_minutes
    # The workers of an engine may wait twice, for the first message and for the last, and a minute is for the answer.
    longest = 60.0 * collective_minutes - 60.0
    if 2 * config.sync.timeout_seconds > longest:
        allowed = f"at most {longest / 2:g} s with parallel.distributed_timeout_minutes={collective_minutes:g}"
        refuse("sync.timeout_seconds", config.sync.timeout_seconds, allowed)
    watchdog, needed = config.watchdog, (2 * config.sync.timeout_seconds + 60.0) / 60.0
    limit = watchdog.phase_limits.get("sync_weights", watchdog.phase_minutes)
    if watchdog.enabled and limit < needed:
        key = "phase_limits.sync_weights" if "sync_weights" in watchdog.phase_limits else "phase_minutes"
        refuse(f"watchdog.{key}", limit, f"at least {needed:g}, twice sync.timeout_seconds and a minute")


def _check_rollout(config: Config, world_size: int | None) -> None:
    rollout, evaluation = config.rollout, config.evaluation
    ranks = num_ranks(config, world_size)
    if rollout.placement is EnginePlacement.disaggregated:
        if rollout.num_engines > ranks:
            refuse("rollout.num_engines", rollout.num_engines, f"at most {ranks}, one per training rank")
        if rollout.quantization is not None:
            refuse("rollout.quantization", rollout.quantization.value, "null with rollout.placement=disaggregated")
        if config.model.batch_invariant_mode:
            refuse("model.batch_invariant_mode", True, "false with rollout.placement=disaggregated")
        _check_limits(config)
        if config.sync.delta and config.sync.transport is SyncTransport.process_group:
            refuse(
                "sync.delta", config.sync.delta, "0 with sync.transport=process_group, whose messages have one length"
            )
    elif config.sync.delta:
        refuse("sync.delta", config.sync.delta, "0 without rollout.placement=disaggregated")
    elif ranks % rollout.tensor_model_parallel_size:
        key = "rollout.tensor_model_parallel_size"
        refuse(key, rollout.tensor_model_parallel_size, f"a divisor of the {ranks} ranks")
    needed = longest_sequence(config)
    if rollout.max_model_len is not None and rollout.max_model_len < needed:
        parts = "data.max_prompt_tokens + rollout.sampling.max_response_tokens"
        refuse("rollout.max_model_len", rollout.max_model_len, f"at least {needed} = {parts}")
    if "" in rollout.sampling.stop:
        refuse("rollout.sampling.stop", rollout.sampling.stop, "strings that are not empty")
    if evaluation.num_samples_per_prompt > 1 and evaluation.temperature == 0:
        refuse(
            "evaluation.num_samples_per_prompt", evaluation.num_samples_per_prompt, "1 with evaluation.temperature 0"
        )
    rewards = [function.name for function in config.rewards.functions]
    if not rewards:
        refuse("rewards.functions", [], "at least one reward, to score completions")
    if evaluation.correct_reward is not None and evaluation.correct_reward not in rewards:
        refuse("evaluation.correct_reward", evaluation.correct_reward, ", ".join(rewards))
