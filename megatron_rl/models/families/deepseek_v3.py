"""DeepSeek-V3, R1 and Moonlight: a sigmoid router with a bias per expert that only counts when it chooses.

The bias is a buffer in float32. Training leaves it as it is (`moe_router_bias_update_rate` 0) unless asked otherwise.
Layers that predict further tokens (`num_nextn_predict_layers`) are no part of the policy: they are neither read nor
written.
"""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder, deepseek

ARCHITECTURE = "DeepseekV3ForCausalLM"

gpt_fields = deepseek.gpt_fields
tensor_maps = partial(deepseek.tensor_maps, expert_bias=True)


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for a router that core does not have."""
    decoder.refuse(hf, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True)
    # A group's score is the sum of its two best experts'.
    fields = deepseek.transformer_fields(hf, grouped=(hf.get("n_group") or 1) > 1, group_scores=2, normalized=True)
    return fields | dict(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.0
    )
