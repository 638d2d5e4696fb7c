"""A training run that knows nothing of this package but how it prepares core for a CPU: Megatron-Core's own parts.

It trains a model of core's local layers for some steps and saves what Megatron's training script saves, as that does.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)

VOCAB_SIZE = 259
SHAPE: dict[str, Any] = dict(
    num_layers=2,
    hidden_size=96,
    ffn_hidden_size=224,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    normalization="RMSNorm",
    layernorm_epsilon=1e-6,
    gated_linear_unit=True,
    add_bias_linear=False,
    qk_layernorm=True,
)
EXPERTS: dict[str, Any] = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=48,
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
    moe_layer_freq=1,
)
PROMPT = [(7 * i * i + 3) % VOCAB_SIZE for i in range(24)]


def run(rank: int, output: Path, sizes: dict[str, int], experts: bool, metadata: dict[str, Any]) -> Tensor:
    """Train, save to output/iter_0000003, and return the logits of PROMPT, [L, VOCAB_SIZE]; collective."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    gpt, optimizer = _build(sizes, experts)
    for _ in range(3):
        _step(gpt, optimizer)
    metadata = {"distrib_optim_sharding_type": "dp_reshardable", **metadata}
    model = gpt.module.sharded_state_dict(metadata=dict(metadata))
    if experts:
        _name_norms_as_transformer_engine(model)
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    rng = ShardedObject("rng_state", [{"torch_rng_state": torch.get_rng_state()}], (1, sizes_of_tp()), (pp, tp))
    state = {
        "args": argparse.Namespace(iteration=3, padded_vocab_size=_padded(), lr=1e-2, tokenizer_type="Byte"),
        "checkpoint_version": 3.0,
        "iteration": 3,
        "num_floating_point_operations_so_far": 12345,
        "model": model,
        "optimizer": optimizer.sharded_state_dict(dict(model), metadata=dict(metadata)),
        "opt_param_scheduler": {"max_lr": 1e-2, "num_steps": 3},
        "rng_state": rng if dist.get_rank() < sizes_of_tp() else {},
    }
    folder = output / "iter_0000003"
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    if rank == 0:
        (output / "latest_checkpointed_iteration.txt").write_text("3")
    return _logits(gpt)


def sizes_of_tp() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_world_size()


def _padded() -> int:
    """Megatron's training script pads to a multiple of 128 and of the tensor-parallel size."""
    multiple = 128 * sizes_of_tp()
    return math.ceil(VOCAB_SIZE / multiple) * multiple


def _build(sizes: dict[str, int], experts: bool) -> tuple[Any, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    for name in ("te_general_gemm", "fused_topk_with_score_function"):  # core only names them beside Transformer Engine
        if not hasattr(moe_utils, name):
            setattr(moe_utils, name, None)
    config = TransformerConfig(
        **SHAPE,
        **(EXPERTS if experts else {}),
        tensor_model_parallel_size=sizes["tensor_model_parallel_size"],
        expert_model_parallel_size=sizes["expert_model_parallel_size"],
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=True, normalization=config.normalization
    )
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=_padded(),
        max_sequence_length=512,
        position_embedding_type="rope",
        rotary_base=10000,
        share_embeddings_and_output_weights=False,
        parallel_output=True,
    )
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), gpt)
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, clip_grad=1.0)
    return ddp, get_megatron_optimizer(optimizer, [ddp])


def _step(ddp: Any, optimizer: Any) -> None:
    from megatron.core.distributed import finalize_model_grads

    ids = torch.tensor(PROMPT)[None]
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    loss = ddp(ids, torch.arange(ids.shape[1])[None], _mask(ids.shape[1]), labels=ids.roll(-1, 1))
    loss.mean().backward()
    finalize_model_grads([ddp])
    assert optimizer.step()[0]


def _mask(length: int) -> Tensor:
    """True: hidden."""
    return torch.ones(1, 1, length, length).triu(1).bool()


@torch.no_grad()
def _logits(ddp: Any) -> Tensor:
    from megatron.core import parallel_state

    ids = torch.tensor(PROMPT)[None]
    part = ddp(ids, torch.arange(ids.shape[1])[None], _mask(ids.shape[1]))[0].contiguous()
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts, dim=-1)[:, :VOCAB_SIZE].clone()


def _name_norms_as_transformer_engine(model: dict[str, Any]) -> None:
    """Its layers with experts keep the norm before them as a module, whose name core's local layers replace."""
    for entry in model.values():
        entry.key = entry.key.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
