"""A model's sizes, from the table of its family; no tensor is made."""

import math
import re
from typing import Any

from megatron_rl.models.families import family_of
from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.placement.sizes import LayerSizes, ModelSizes

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def model_sizes(hf: dict[str, Any], *, tp: int = 1, etp: int = 1) -> ModelSizes:
    """Sizes of the model of a config.json, and of one rank's part of it.

    Args:
        hf: config.json.
        tp, etp: ranks that split each layer, and each expert.

    Raises:
        UserError: the architecture, or an option of it, is not supported.
    """
    fields = family_of(hf).transformer_fields(hf)
    of_layers: dict[int, list[TensorMap]] = {}
    outside: dict[str, TensorMap] = {}
    for tensor_map in family_of(hf).tensor_maps(hf):
        match = _LAYER.match(tensor_map.name)
        if match is None:
            outside[tensor_map.name] = tensor_map
        elif not tensor_map.expert and not tensor_map.name.endswith("expert_bias"):  # of the experts, the first
            of_layers.setdefault(int(match[1]), []).append(tensor_map)
    embedding, output = (outside.get(f"{n}.weight") for n in ("embedding.word_embeddings", "output_layer"))
    assert embedding is not None
    latent = bool(fields.get("multi_latent_attention"))
    rope, value = fields.get("qk_pos_emb_head_dim", 0), fields.get("v_head_dim", fields["kv_channels"])
    key = fields["qk_head_dim"] + rope if latent else fields["kv_channels"]
    groups = fields["num_query_groups"]
    return ModelSizes(
        layers=tuple(_layer(maps, fields, number, tp, etp) for number, maps in sorted(of_layers.items())),
        embedding=_whole(embedding),
        embedding_on_rank=_on_rank(embedding, tp),
        final_norm=sum(_whole(m) for name, m in outside.items() if name.startswith("decoder.final")),
        output=0 if output is None else _whole(output),
        output_on_rank=0 if output is None else _on_rank(output, tp),
        hidden=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        key_channels=key,
        value_channels=value,
        kv_heads=groups,
        cached=fields["kv_lora_rank"] + rope if latent else groups * (key + value),
        cache_is_latent=latent,
        ffn=fields["ffn_hidden_size"],
        gated=bool(fields.get("gated_linear_unit")),
        rms_norm=fields.get("normalization") == "RMSNorm",
        query_key_norm=bool(fields.get("qk_layernorm")) and not latent,
        num_experts=fields.get("num_moe_experts") or 0,
        topk=fields.get("moe_router_topk", 0) if fields.get("num_moe_experts") else 0,
        expert_ffn=fields.get("moe_ffn_hidden_size") or 0,
        shared_ffn=fields.get("moe_shared_expert_intermediate_size") or 0,
    )


def _layer(maps: list[TensorMap], fields: dict[str, Any], number: int, tp: int, etp: int) -> LayerSizes:
    dense = [m for m in maps if m.expert is None]
    expert = [m for m in maps if m.expert is not None]
    window = fields.get("window_size")
    windowed = window is not None and (fields.get("window_attn_skip_freq") or [1] * (number + 1))[number]
    return LayerSizes(
        dense=sum(map(_whole, dense)),
        dense_matrices=sum(_whole(m) for m in dense if len(m.matrix_shape(next(iter(m.hf_shapes)))) > 1),
        dense_on_rank=sum(_on_rank(m, tp) for m in dense),
        expert=sum(map(_whole, expert)),
        expert_on_rank=sum(_on_rank(m, etp) for m in expert),
        window=window[0] + 1 if windowed and window else None,
    )


def _whole(tensor_map: TensorMap) -> int:
    return sum(math.prod(tensor_map.matrix_shape(name)) for name in tensor_map.hf_shapes)


def _on_rank(tensor_map: TensorMap, size: int) -> int:
    return math.prod(tensor_map.shard_shape(0, size))
