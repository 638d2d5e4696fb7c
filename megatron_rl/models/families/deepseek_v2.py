"""DeepSeek-V2 and V2-Lite: a softmax router whose scores are not renormalised."""

from functools import partial
from typing import Any

from megatron_rl.models.families import decoder, deepseek

ARCHITECTURE = "DeepseekV2ForCausalLM"

gpt_fields = deepseek.gpt_fields
tensor_maps = partial(deepseek.tensor_maps, expert_bias=False)


def transformer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields. Raises UserError for a router that core does not have."""
    method = hf.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        decoder.refuse(hf, topk_method="greedy")
    decoder.refuse(hf, norm_topk_prob=False, scoring_func="softmax")
    # A group's score is its best expert's.
    fields = deepseek.transformer_fields(hf, grouped=method == "group_limited_greedy", group_scores=1, normalized=False)
    return fields | dict(moe_router_pre_softmax=True)
