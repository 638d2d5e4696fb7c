"""Random models that a layout can hold: families, heads, experts, vocabularies and stages of every shape."""

import math
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from tests.checkpoints import FAMILIES

DENSE = ("llama", "mistral", "nemotron", "qwen2", "qwen3")
EXPERTS = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe")


@dataclass(frozen=True)
class RandomModel:
    """A family, fields of its config.json, and the layout of the ranks that hold it (ParallelConfig's fields)."""

    family: str
    fields: dict[str, Any]
    parallel: dict[str, Any] = field(default_factory=dict)


@st.composite
def random_models(draw: st.DrawFn, num_ranks: int) -> RandomModel:
    """A model for a world of so many ranks; what they do not split they replicate."""
    family = draw(st.sampled_from(DENSE + EXPERTS))
    tp = draw(st.sampled_from([size for size in (4, 2, 1) if num_ranks % size == 0]))
    pp = draw(st.sampled_from([size for size in (4, 2, 1) if num_ranks // tp % size == 0]))
    fields = dict(
        vocab_size=draw(st.integers(97, 131)),
        hidden_size=draw(st.sampled_from([32, 48, 64])),
        intermediate_size=draw(st.sampled_from([40, 56, 68])),
        **draw(_heads(tp, latent="kv_lora_rank" in FAMILIES[family])),
    )
    if family == "llama":  # transformers wants a multiple of the heads, though head_dim is another matter
        fields["hidden_size"] += -fields["hidden_size"] % math.lcm(fields["num_attention_heads"], 4)
    if family in DENSE:
        fields["tie_word_embeddings"] = draw(st.booleans())
    parallel: dict[str, Any] = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    parallel |= draw(_stages(pp, fields))
    if family in EXPERTS:
        parallel |= draw(_experts(family, tp, num_ranks // pp, fields))
    elif tp > 1:
        parallel["sequence_parallel"] = draw(st.booleans())
    return RandomModel(family, fields, parallel)


def different_families(num_ranks: int, count: int) -> st.SearchStrategy[list[RandomModel]]:
    """So many random models, no two of a family."""
    models = random_models(num_ranks)
    return st.lists(models, min_size=count, max_size=count, unique_by=lambda model: model.family)


@st.composite
def _heads(draw: st.DrawFn, tp: int, *, latent: bool) -> dict[str, Any]:
    """Query heads that the ranks divide, in groups that the ranks divide or that divide the ranks."""
    if latent:
        heads = draw(st.sampled_from([4, 8]))
        ranks = dict(kv_lora_rank=24, q_lora_rank=draw(st.sampled_from([None, 20])))
        sizes = dict(qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=draw(st.sampled_from([8, 16])))
        return dict(num_attention_heads=heads, num_key_value_heads=heads, **ranks, **sizes)
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if n % tp == 0 or tp % n == 0]))
    each = draw(st.sampled_from([n for n in (1, 2, 3, 4) if n * groups % tp == 0]))
    return dict(
        num_key_value_heads=groups, num_attention_heads=groups * each, head_dim=draw(st.sampled_from([8, 16, 20]))
    )


@st.composite
def _stages(draw: st.DrawFn, pp: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Stages of any size, or of several chunks each; sets the number of layers."""
    if pp == 1:
        fields["num_hidden_layers"] = draw(st.integers(1, 3))
        return {}
    if pp == 2 and draw(st.booleans()):
        fields["num_hidden_layers"] = 4
        return {"virtual_pipeline_model_parallel_size": 2}
    first, last = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    fields["num_hidden_layers"] = first + (pp - 2) + last
    return {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}


@st.composite
def _experts(draw: st.DrawFn, family: str, tp: int, stage_ranks: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Experts, which are spread, split or both; sets their number."""
    whole = family == "gpt_oss"  # core splits no expert with a bias
    splits = [
        (ep, etp)
        for ep in (1, 2, 4)
        for etp in (1, 2, 4)
        if stage_ranks % (ep * etp) == 0 and (etp == tp if ep == 1 else etp <= tp) and (etp == 1 or not whole)
    ]
    ep, etp = draw(st.sampled_from(splits)) if splits else (stage_ranks, 1)
    count = ep * draw(st.integers(1, 3) if ep > 1 else st.integers(2, 5))
    name = next((n for n in ("num_local_experts", "n_routed_experts") if n in FAMILIES[family]), "num_experts")
    fields[name] = count
    fewest = 1 if family == "deepseek_v2" else 2  # two where the weights of the chosen ones are to add up to 1
    fields["num_experts_per_tok"] = draw(st.integers(fewest, min(3, count)))
    if "moe_intermediate_size" in FAMILIES[family]:
        fields["moe_intermediate_size"] = draw(st.sampled_from([12, 28]))
    if "first_k_dense_replace" in FAMILIES[family]:
        fields["first_k_dense_replace"] = draw(st.integers(0, 1))
    if family == "deepseek_v3":
        grouped = count % 2 == 0 and count >= 4 and draw(st.booleans())
        fields |= dict(n_group=2, topk_group=1, num_experts_per_tok=2) if grouped else dict(n_group=1, topk_group=1)
    return dict(expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, sequence_parallel=tp > 1)
