"""Mixture-of-experts feed-forward parts: a router, experts that are parameters of their own, and shared ones."""

from typing import Any

from megatron_rl.models.families.decoder import gated, hf_layer, megatron_layer, require
from megatron_rl.models.tensor_map import TensorMap, of_expert, replicated

GATED_NAMES = ("gate_proj", "up_proj", "down_proj")


def num_experts(hf: dict[str, Any]) -> int:
    """Routed experts of a layer, whatever the family and the version of transformers call them.

    Raises:
        UserError: no number of them.
    """
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return require(hf, next((name for name in names if hf.get(name) is not None), names[0]), 1)


def transformer_fields(hf: dict[str, Any], *, ffn: int, normalized: bool = False) -> dict[str, Any]:
    """TransformerConfig fields of experts of `ffn` channels, without auxiliary losses.

    A load-balancing loss is of pre-training: here the loss is the objective, and nothing is added to it unasked.

    Args:
        hf: config.json.
        ffn: channels of an expert.
        normalized: whether the weights of the chosen experts are made to add up to 1. The weight of one alone would be
            1, whatever its score, and the router would learn nothing: core does not do that.

    Raises:
        UserError: no experts, or a token sees too few of them, or more than there are.
    """
    return dict(
        num_moe_experts=num_experts(hf),
        moe_router_topk=require(hf, "num_experts_per_tok", 2 if normalized else 1, num_experts(hf)),
        moe_ffn_hidden_size=ffn,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
    )


def expert_prefix(layer: int, expert: int) -> str:
    """Prefix of an expert's names, its number counted over the whole layer."""
    return f"{megatron_layer(layer)}mlp.experts.local_experts.{expert}."


def experts(
    hf: dict[str, Any],
    layer: int,
    *,
    ffn: int,
    block: str = "mlp",
    names: tuple[str, str, str] = GATED_NAMES,
) -> list[TensorMap]:
    """The router and the gated experts of one layer; `block` and `names` are Hugging Face's."""
    hidden, count = hf["hidden_size"], num_experts(hf)
    hf_prefix = f"{hf_layer(layer)}{block}."
    maps = [replicated(f"{megatron_layer(layer)}mlp.router.weight", f"{hf_prefix}gate.weight", (count, hidden))]
    for expert in range(count):
        parts = gated(expert_prefix(layer, expert), f"{hf_prefix}experts.{expert}.", hidden, ffn, names)
        maps += [of_expert(part, expert, count) for part in parts]
    return maps


def shared_experts(hf: dict[str, Any], layer: int, *, ffn: int) -> list[TensorMap]:
    """The experts that see every token, as one gated MLP."""
    return gated(
        f"{megatron_layer(layer)}mlp.shared_experts.", f"{hf_layer(layer)}mlp.shared_experts.", hf["hidden_size"], ffn
    )
