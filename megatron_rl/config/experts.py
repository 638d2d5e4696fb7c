"""What a configuration may not be where the model has experts, or has none."""

from megatron_rl.config.errors import refuse
from megatron_rl.config.hf_checkpoint import ModelShape
from megatron_rl.config.schema import Config, EnginePlacement, ParallelConfig

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
            # The backward pass chooses anew, of a row that another one has followed by then.
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
        refuse(key, kind, ", ".join(_BALANCING_TYPES) + ": rows hold several sequences, in any order")
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
