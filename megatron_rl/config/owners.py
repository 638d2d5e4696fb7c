"""Fields of TransformerConfig and of vLLM's engine that a key of ours decides: set twice, they could disagree."""

from megatron_rl.config.errors import refuse
from megatron_rl.config.schema import Config

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
