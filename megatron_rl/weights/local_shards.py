"""This rank's parameters under the names of the families' tables."""

import re
from collections.abc import Sequence

from torch import Tensor, nn

from megatron_rl.models.tensor_map import TensorMap

# Transformer Engine fuses each norm into the linear layer after it; the tables use the unfused names.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")


def local_parameters(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Parameters of this rank's model chunks (unwrapped GPTModels) by table name.

    Layers are numbered over the whole model. The copy of a tied embedding that a last pipeline stage keeps as its
    output layer is left out: it is the first stage's parameter.
    """
    parameters: dict[str, Tensor] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            match = _LAYER.match(name)
            if match:
                layer = chunk.decoder.layers[int(match[1])].layer_number - 1  # type: ignore[union-attr,index]
                name = f"decoder.layers.{layer}.{_FUSED_NORMS.get(match[2], match[2])}"
            elif name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                continue
            parameters[name] = parameter
    return parameters


def check_table(parameters: dict[str, Tensor], maps: Sequence[TensorMap], tp_rank: int, tp_size: int) -> None:
    """Assert that the table describes these parameters: every one of them, in the shape that this rank holds."""
    table = {tensor_map.name: tensor_map for tensor_map in maps}
    for name, parameter in parameters.items():
        assert name in table, f"parameter {name} is not in the family's table"
        expected = table[name].shard_shape(tp_rank, tp_size)
        assert tuple(parameter.shape) == expected, f"parameter {name}: shape {tuple(parameter.shape)}, table {expected}"
