"""The parameters of a vLLM model and what each rank's shard of them is made of, as data.

vLLM fuses what one matrix product can serve: query, key and value projections, gate and up projections, the down
projections of latent attention, the experts of a layer. Which of its parameters a Hugging Face tensor belongs to, and
how it is split, follows from the tensor's name by the rules below, for every decoder of the supported families:

    q_proj k_proj v_proj                qkv_proj: heads split over ranks; a KV head is repeated where ranks exceed heads
    q_a_proj kv_a_proj_with_mqa         fused_qkv_a_proj, on every rank
    gate_proj up_proj                   gate_up_proj: each rank stacks its parts
    experts.N.gate_proj up_proj         row N of routed_experts.w13_weight; down_proj: of w2_weight
    o_proj down_proj                    split by columns, their biases on every rank
    embed_tokens lm_head                padded to a multiple of 64 rows, split by rows
    other *_proj, sinks                 split by rows
    norms, router                       on every rank

`rollout/weight_loading.py` compares shapes with the engine's before the first copy, so a release of vLLM that fuses
otherwise is an error and not a wrong model. Pure: shapes in, row ranges out. Read off vLLM 0.32.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_rl.models.tensor_map import RowRange, TensorMap, gate_up, of_expert, replicated, split

_VOCABULARY_MULTIPLE = 64
_EXPERT = re.compile(r"^(?P<mlp>.*)\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight$")
_SINKS = ".self_attn.sinks"
_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")

Shapes = Mapping[str, tuple[int, ...]]


def engine_maps(maps: Sequence[TensorMap], *, num_key_value_heads: int) -> list[TensorMap]:
    """The table of a vLLM model, in the order of the layers.

    Args:
        maps: the family's table.
        num_key_value_heads: of the attention.

    Returns:
        Maps by vLLM's names. That of an expert's row of a stack ends in '[N]', N counted over the whole layer.
    """
    shapes = hf_shapes(maps)
    table: list[TensorMap] = []
    done: set[str] = set()
    for source in maps:
        if source.index is not None:
            table.append(_row_of_stacked(source))
            continue
        for name, shape in source.hf_shapes.items():
            if name in done:
                continue
            if source.expert is not None:
                tensor_map = of_expert(_expert_map(name, shapes), source.expert, source.num_experts)
            else:
                tensor_map = _dense_map(name, shape, shapes, num_key_value_heads)
            table.append(tensor_map)
            done.update(tensor_map.hf_shapes)
    return [_as_gpt_oss(entry) for entry in table] if any(entry.name.endswith(_SINKS) for entry in table) else table


def _as_gpt_oss(tensor_map: TensorMap) -> TensorMap:
    """vLLM's GPT-OSS has two names of its own."""
    name = tensor_map.name.replace("model.embed_tokens.", "model.embedding.").replace(".self_attn.", ".attn.")
    return replace(tensor_map, name=name)


def _expert_map(name: str, shapes: Shapes) -> TensorMap:
    match = _EXPERT.match(name)
    assert match is not None, f"{name} is no tensor of an expert that vLLM is known to load"
    number, mlp, part = int(match["number"]), match["mlp"], match["part"]
    stem, fused = f"{mlp}.experts.{number}.", f"{mlp}.experts.routed_experts."
    if part in _DOWN:
        return split(f"{fused}w2_weight[{number}]", name, shapes[name], dim=1)
    gate, up = (_first(stem, parts, shapes) for parts in (_GATE, _UP))
    return gate_up(f"{fused}w13_weight[{number}]", gate, up, shapes[gate])


def _first(stem: str, parts: tuple[str, ...], shapes: Shapes) -> str:
    return next(name for part in parts if (name := f"{stem}{part}.weight") in shapes)


def _dense_map(name: str, shape: tuple[int, ...], shapes: Shapes, num_key_value_heads: int) -> TensorMap:
    module, _, kind = name.rpartition(".")  # kind: weight, bias
    owner, _, layer = module.rpartition(".")
    sibling = {part: f"{owner}.{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
    if layer in ("q_proj", "k_proj", "v_proj") and sibling["k_proj"] in shapes:
        q, k, v = (sibling[part] for part in ("q_proj", "k_proj", "v_proj"))
        return _fused_qkv(f"{owner}.qkv_proj.{kind}", {n: shapes[n] for n in (q, k, v)}, num_key_value_heads)
    if layer in ("q_a_proj", "kv_a_proj_with_mqa") and f"{owner}.q_a_proj.{kind}" in shapes:
        parts = {n: shapes[n] for n in (f"{owner}.q_a_proj.{kind}", f"{owner}.kv_a_proj_with_mqa.{kind}")}
        return _stacked(f"{owner}.fused_qkv_a_proj.{kind}", parts)
    if layer in ("gate_proj", "up_proj") and sibling["gate_proj"] in shapes:
        return gate_up(f"{owner}.gate_up_proj.{kind}", sibling["gate_proj"], sibling["up_proj"], shape)
    if layer in ("embed_tokens", "lm_head"):
        return _padded_vocabulary(name, shape)
    if layer in ("o_proj", "down_proj"):
        return split(name, name, shape, dim=1) if len(shape) == 2 else replicated(name, name, shape)
    if layer.endswith("_proj") and layer != "kv_a_proj_with_mqa" and kind in ("weight", "bias"):
        return split(name, name, shape, dim=0)
    if name.endswith(_SINKS):
        return split(name, name, shape, dim=0)
    return replicated(name, name, shape)


def _stacked(name: str, parts: dict[str, tuple[int, ...]]) -> TensorMap:
    return TensorMap(name, parts, 0, True, lambda rank, size: [RowRange(part, 0, s[0]) for part, s in parts.items()])


def _fused_qkv(name: str, parts: dict[str, tuple[int, ...]], num_key_value_heads: int) -> TensorMap:
    (q, q_shape), *key_value = parts.items()

    def row_ranges(rank: int, size: int) -> list[RowRange]:
        rows = q_shape[0] // size
        pieces = [RowRange(q, rank * rows, rows)]
        for hf_name, shape in key_value:
            num_splits = min(size, num_key_value_heads)
            rows = shape[0] // num_splits
            pieces.append(RowRange(hf_name, rank * num_splits // size * rows, rows))
        return pieces

    return TensorMap(name, parts, 0, False, row_ranges)


def _padded_vocabulary(name: str, shape: tuple[int, ...]) -> TensorMap:
    padded = -(-shape[0] // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE

    def row_ranges(rank: int, size: int) -> list[RowRange]:
        part = padded // size
        first = min(rank * part, shape[0])
        real = min(part, shape[0] - first)
        return ([RowRange(name, first, real)] if real else []) + (
            [RowRange(None, 0, part - real)] if part > real else []
        )

    return TensorMap(name, {name: shape}, 0, False, row_ranges)


def _row_of_stacked(source: TensorMap) -> TensorMap:
    """GPT-OSS: row N of the stacks, rows of gate and up alternating as they are stored."""
    (name,) = source.hf_shapes
    mlp, _, part = name.rpartition(".experts.")
    kind = "bias" if part.endswith("_bias") else "weight"
    fused = f"{mlp}.experts.routed_experts.{'w2' if part.startswith('down') else 'w13'}_{kind}[{source.expert}]"
    shape = source.matrix_shape(name)
    if kind == "bias" and part.startswith("down"):

        def first_rank_only(rank: int, size: int) -> list[RowRange]:
            # vLLM sums the ranks' outputs: one of them adds the bias, the others hold zeros.
            return [RowRange(name if rank == 0 else None, 0, shape[0])]

        return replace(source, name=fused, dim=0, replicated=False, row_ranges=first_rank_only)
    dim = 1 if part.startswith("down") else 0
    return replace(
        source, name=fused, dim=dim, replicated=False, row_ranges=split(fused, name, shape, dim=dim).row_ranges
    )


def hf_shapes(maps: Sequence[TensorMap]) -> dict[str, tuple[int, ...]]:
    """All Hugging Face tensors of a family's table, in its order."""
    return {name: shape for tensor_map in maps for name, shape in tensor_map.hf_shapes.items()}
