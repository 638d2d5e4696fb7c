"""This rank's parameters under the names of the families' tables, and their parts.

`local_parameters` names them, `Place` is the rank's position in the groups that split them, `check_table` compares both
with a table. `matrix`, `rows` and `shard_parts` turn the table's row ranges into views of tensors.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_rl.models.tensor_map import RowRange, TensorMap
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.plan.ranks import TrainedRanks, layer_of

# Transformer Engine fuses each norm into the linear layer after it; the tables use the unfused names.
FUSED_NORMS = {
    "self_attention.linear_qkv": "input_layernorm",
    "self_attention.linear_q_up_proj": "self_attention.q_layernorm",
    "self_attention.linear_kv_up_proj": "self_attention.kv_layernorm",
    "mlp.linear_fc1": "pre_mlp_layernorm",
}
"""Linear layer -> the norm before it, by names in a layer."""
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_FUSED_NORM = re.compile(r"^(.*)\.layer_norm_(weight|bias)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.*)$")
_GROUPED_EXPERT = re.compile(r"^mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
VALUE_HEAD = "value_head"
"""Where a model with a critic on its backbone keeps the critic's head; see `engine/scalar_model.py`."""
_BUFFERS = (".router.expert_bias",)
"""Buffers that are weights of the Hugging Face checkpoint."""


def local_parameters(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Weights of this rank's model chunks (unwrapped GPTModels) by table name: parameters, and buffers like them.

    Layers are numbered over the whole model, experts over their whole layer. The copy of a tied embedding that a last
    pipeline stage keeps as its output layer is left out: it is the first stage's parameter. So is a value head beside
    the output layer, which no table has.
    """
    parameters: dict[str, Tensor] = {}
    for chunk in chunks:
        weights = [(name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(_BUFFERS)]
        for name, parameter in (*chunk.named_parameters(), *weights):
            if name.startswith(f"{VALUE_HEAD}."):
                continue
            match = _LAYER.match(name)
            if match:
                layer: Any = chunk.decoder.layers[int(match[1])]  # type: ignore[union-attr,index]
                name = f"decoder.layers.{layer.layer_number - 1}.{_name_in_layer(match[2], layer)}"
            elif name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                continue
            parameters[name] = parameter
    return parameters


def _name_in_layer(name: str, layer: Any) -> str:
    """The table's name of a parameter of `layer`, given core's."""
    if fused := _FUSED_NORM.match(name):
        return f"{FUSED_NORMS[fused[1]]}.{fused[2]}"
    if grouped := _GROUPED_EXPERT.match(name):
        name = f"mlp.experts.local_experts.{grouped[3]}.{grouped[1]}.{grouped[2]}"
    if expert := _EXPERT.match(name):
        first = layer.mlp.local_expert_indices[0]
        return f"mlp.experts.local_experts.{first + int(expert[1])}.{expert[2]}"
    return name


@dataclass(frozen=True)
class Place:
    """Which shard of a parameter a rank holds: (rank, size) of the group that splits it."""

    tp: tuple[int, int] = (0, 1)
    """In the tensor-parallel group, which splits all parameters but the experts'."""
    etp: tuple[int, int] = (0, 1)
    """In the expert-tensor-parallel group, which splits the experts'."""

    @staticmethod
    def of(groups: Groups) -> "Place":
        """The place of this rank."""
        return Place((groups.tp.rank(), groups.tp.size()), (groups.etp.rank(), groups.etp.size()))

    def in_group_of(self, tensor_map: TensorMap) -> tuple[int, int]:
        """(rank, size) in the group that splits this parameter."""
        return self.tp if tensor_map.expert is None else self.etp


def trained_ranks(parameters: Mapping[str, Tensor], groups: Groups) -> TrainedRanks:
    """The layout that a model has, given this rank's part of it; collective over its pipeline."""
    mine = sorted({layer for name in parameters if (layer := layer_of(name)) is not None})
    stages: list[list[int]] = [[] for _ in range(groups.pp.size())]
    dist.all_gather_object(stages, mine, group=groups.pp)
    stage_of_layer = {layer: stage for stage, layers in enumerate(stages) for layer in layers}
    return TrainedRanks(
        tensor=groups.tp.size(),
        pipeline=groups.pp.size(),
        data=groups.dp.size(),
        stage_of_layer=tuple(stage_of_layer[layer] for layer in sorted(stage_of_layer)),
        context=groups.cp.size(),
        expert=groups.ep.size(),
        expert_tensor=groups.etp.size(),
    )


def check_table(parameters: dict[str, Tensor], maps: Sequence[TensorMap], place: Place) -> None:
    """Assert that the table describes these parameters: every one of them, in the shape that this rank holds."""
    table = {tensor_map.name: tensor_map for tensor_map in maps}
    for name, parameter in parameters.items():
        assert name in table, f"parameter {name} is not in the family's table"
        expected = table[name].shard_shape(*place.in_group_of(table[name]))
        assert tuple(parameter.shape) == expected, f"parameter {name}: shape {tuple(parameter.shape)}, table {expected}"


def matrix(tensor_map: TensorMap, hf_tensor: Tensor) -> Tensor:
    """View of a whole Hugging Face tensor, as stored, whose rows along `tensor_map.dim` the row ranges count."""
    view = hf_tensor if tensor_map.index is None else hf_tensor[tensor_map.index]
    return view.t() if tensor_map.transposed else view


def rows(view: Tensor, dim: int, row_range: RowRange) -> Tensor:
    """View of a row range of a matrix."""
    last = row_range.start + (row_range.size - 1) * row_range.step
    index = slice(row_range.start, last + 1, row_range.step)
    return view[(slice(None),) * dim + (index,)]


@dataclass(frozen=True)
class ShardPart:
    """A row range, and the part of a shard that it fills."""

    row_range: RowRange
    shard: Tensor


def shard_parts(tensor_map: TensorMap, rank: int, size: int, shard: Tensor) -> Iterator[ShardPart]:
    """The shard of rank `rank` of `size`, cut into views, one for each row range."""
    offset = 0
    for row_range in tensor_map.row_ranges(rank, size):
        yield ShardPart(row_range, shard.narrow(tensor_map.dim, offset, row_range.size))
        offset += row_range.size
