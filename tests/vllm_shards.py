"""What vLLM's loaders put into each rank's parameters, written out from whole Hugging Face tensors with numpy.

Head by head and expert by expert, sharing no code with the tables of `megatron_rl/weights`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def vllm_shards(
    whole: dict[str, Array], *, num_key_value_heads: int, tp: int, rank: int, experts: range | None = None
) -> dict[str, Array]:
    """Parameters of tensor-parallel rank `rank` of `tp`; of a stack's row N as 'name[N]'.

    Args:
        whole: Hugging Face tensors by name.
        num_key_value_heads: of the attention.
        tp: tensor-parallel size.
        rank: in [0, tp).
        experts: those that this rank holds whole (expert parallel); None: it holds a part of each.
    """

    def rows(x: Array, parts: int = tp, part: int = rank) -> Array:
        return np.split(x, parts)[part]

    def columns(x: Array) -> Array:
        return np.split(x, tp, axis=1)[rank]

    def vocabulary(x: Array) -> Array:
        padded = np.zeros((-(-len(x) // 64) * 64, x.shape[1]), x.dtype)
        padded[: len(x)] = x
        return rows(padded)

    def kind(part: str) -> str:
        return "bias" if part.endswith("_bias") else "weight"

    def heads(x: Array) -> Array:
        """KV heads of this rank: its part, or with more ranks than heads the one that tp/heads ranks share."""
        few = num_key_value_heads < tp
        return rows(x, num_key_value_heads, rank // (tp // num_key_value_heads)) if few else rows(x)

    out: dict[str, Array] = {}
    for name, x in whole.items():
        owner, _, last = name.rpartition(".")
        parent, _, module = owner.rpartition(".")
        if name.endswith(("_proj", "_proj_bias")):  # GPT-OSS: the experts' matrices transposed and stacked
            stack, fused = f"{owner}.routed_experts", "w2" if last.startswith("down") else "w13"
            for number, of_expert in enumerate(x):
                if fused == "w13":  # rows of gate and up take turns, and each rank has as many of both
                    out[f"{stack}.w13_{kind(last)}[{number}]"] = rows(of_expert.T if of_expert.ndim > 1 else of_expert)
                elif of_expert.ndim > 1:
                    out[f"{stack}.w2_weight[{number}]"] = columns(of_expert.T)
                else:  # the ranks' outputs are summed, so one of them adds the bias
                    out[f"{stack}.w2_bias[{number}]"] = of_expert if rank == 0 else np.zeros_like(of_expert)
        elif ".experts." in name:
            stack, number = parent.rsplit(".", 1)
            gate, up, down = (
                ("w1", "w3", "w2") if module in ("w1", "w2", "w3") else ("gate_proj", "up_proj", "down_proj")
            )
            here = experts is None or int(number) in experts
            cut_rows, cut_columns = (rows, columns) if experts is None else (np.asarray, np.asarray)
            if here and module == gate:
                both = np.concatenate([cut_rows(x), cut_rows(whole[f"{parent}.{up}.weight"])])
                out[f"{stack}.routed_experts.w13_weight[{number}]"] = both
            elif here and module == down:
                out[f"{stack}.routed_experts.w2_weight[{number}]"] = cut_columns(x)
        elif module == "q_proj" and f"{parent}.k_proj.{last}" in whole:
            k, v = (whole[f"{parent}.{part}_proj.{last}"] for part in "kv")
            out[f"{parent}.qkv_proj.{last}"] = np.concatenate([rows(x), heads(k), heads(v)])
        elif module == "q_a_proj":
            down = whole[f"{parent}.kv_a_proj_with_mqa.{last}"]
            out[f"{parent}.fused_qkv_a_proj.{last}"] = np.concatenate([x, down])
        elif module == "gate_proj":
            out[f"{parent}.gate_up_proj.{last}"] = np.concatenate([rows(x), rows(whole[f"{parent}.up_proj.{last}"])])
        elif module in ("embed_tokens", "lm_head"):
            out[name] = vocabulary(x)
        elif module in ("o_proj", "down_proj"):
            out[name] = columns(x) if x.ndim > 1 else x
        elif module in ("q_proj", "q_b_proj", "kv_b_proj") or (
            module == "up_proj" and f"{parent}.gate_proj.{last}" not in whole
        ):
            out[name] = rows(x)
        elif (
            (module not in ("k_proj", "v_proj", "up_proj") and f"{parent}.q_a_proj.{last}" not in whole)
            or "layernorm" in module
            or "norm" in module
        ):
            out[name] = x
        if last == "sinks":
            out[name] = rows(x)
    if any(name.endswith(".sinks") for name in out):  # GPT-OSS, where vLLM has two names of its own
        own = {"model.embed_tokens.": "model.embedding.", ".self_attn.": ".attn."}
        for theirs, ours in own.items():
            out = {name.replace(theirs, ours): x for name, x in out.items()}
    return out
