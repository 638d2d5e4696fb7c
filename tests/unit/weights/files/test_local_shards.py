"""Parameters of a rank's model under the names of the tables."""

import pytest
import torch
from torch import nn

from megatron_rl.models.tensor_map import split
from megatron_rl.weights.files.local_shards import Place, check_table, local_parameters


class Stage(nn.Module):
    """A pipeline stage with core's names: layers 3 and 4 of a model (core counts from 1), and the output layer."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.share_embeddings_and_output_weights = tied
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([self.layer(3), self.layer(4)])
        self.output_layer = nn.Linear(2, 3, bias=False)

    @staticmethod
    def layer(number: int) -> nn.Module:
        layer = nn.Module()
        layer.layer_number = number
        layer.mlp = nn.Module()
        layer.mlp.linear_fc1 = nn.Module()
        layer.mlp.linear_fc1.weight = nn.Parameter(torch.full((4, 2), float(number)))
        layer.mlp.linear_fc1.layer_norm_weight = nn.Parameter(torch.full((2,), float(number)))
        return layer


def test_layers_are_numbered_over_the_model_and_fused_norms_have_their_own_names():
    parameters = local_parameters([Stage(tied=False)])
    assert {name: tensor[0].tolist() for name, tensor in parameters.items() if "layers" in name} == {
        "decoder.layers.2.mlp.linear_fc1.weight": [3.0, 3.0],
        "decoder.layers.2.pre_mlp_layernorm.weight": 3.0,
        "decoder.layers.3.mlp.linear_fc1.weight": [4.0, 4.0],
        "decoder.layers.3.pre_mlp_layernorm.weight": 4.0,
    }
    assert "output_layer.weight" in parameters


def test_the_copy_of_a_tied_embedding_is_left_out():
    assert "output_layer.weight" not in local_parameters([Stage(tied=True)])


def test_a_table_that_does_not_describe_the_parameters():
    maps = [split("fc1", "theirs", (4, 2), dim=0)]
    check_table({"fc1": torch.zeros(2, 2)}, maps, Place(tp=(0, 2)))
    check_table({}, maps, Place(tp=(0, 2)))  # of another stage
    with pytest.raises(AssertionError, match="fc2 is not in the family's table"):
        check_table({"fc2": torch.zeros(2, 2)}, maps, Place(tp=(0, 2)))
    with pytest.raises(AssertionError, match=r"fc1: shape \(4, 2\), table \(2, 2\)"):
        check_table({"fc1": torch.zeros(4, 2)}, maps, Place(tp=(0, 2)))
