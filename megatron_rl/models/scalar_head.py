"""A head that gives one number per token in the place of the output layer: a value, or a reward.

It sits where GPTModel keeps its output layer and is called as that one is, so pipeline stages, recomputation, DDP and
core's distributed checkpoints need to know nothing of it. Its weight is replicated over the tensor-parallel ranks: a
row of `hidden_size` numbers is not worth a collective. All ranks see the whole sequence and hence compute equal
numbers and equal gradients. In Hugging Face's files it is `score`, as in the *ForSequenceClassification (no bias) and
*ForTokenClassification (bias) models of every family.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_rl.config.errors import UserError
from megatron_rl.device import this_device
from megatron_rl.models.families import family_of
from megatron_rl.models.tensor_map import TensorMap, replicated

SEQUENCE, TOKEN, CAUSAL = "ForSequenceClassification", "ForTokenClassification", "ForCausalLM"


class ScalarHead(nn.Module):
    """hidden [T (or T/tp), B, H] -> [T, B, 1], float32."""

    def __init__(self, config: TransformerConfig, *, bias: bool) -> None:
        """Zeros: every value starts at 0 on every layout, and the first update already moves the head."""
        super().__init__()
        place: Any = dict(dtype=config.params_dtype, device=this_device())
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, **place))
        self.bias = nn.Parameter(torch.zeros(1, **place)) if bias else None
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **unused: Any) -> tuple[Tensor, None]:
        """As ColumnParallelLinear.forward of the output layer; no weight is ever shared with it."""
        assert weight is None, "a scalar head has a weight of its own"
        if self.sequence_parallel:
            # Each rank goes on with the gradient of the whole sequence, equal on all of them, so it only takes its
            # part of it; a sum over the ranks would count it tp times.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias), None


def is_scalar(hf: dict[str, Any]) -> bool:
    """Whether a config.json is a classifier's."""
    return (hf.get("architectures") or [""])[0].endswith((SEQUENCE, TOKEN))


def is_per_token(hf: dict[str, Any]) -> bool:
    """Whether it is one of tokens, whose head has a bias."""
    return bool(hf["architectures"][0].endswith(TOKEN))


def backbone_config(hf: dict[str, Any]) -> dict[str, Any]:
    """config.json of the language model under a scalar head: the same model without tied output weights.

    Args:
        hf: config.json of a *ForCausalLM, *ForSequenceClassification or *ForTokenClassification.

    Raises:
        UserError: a classifier of more than one label, which is no reward.
    """
    architecture = (hf.get("architectures") or ["none"])[0]
    if architecture.endswith((SEQUENCE, TOKEN)):
        num_labels = hf.get("num_labels") or len(hf.get("id2label") or {0: "", 1: ""})
        if num_labels != 1:
            raise UserError(f"num_labels in config.json of {architecture}: given {num_labels}, allowed: 1, a score")
        architecture = architecture.replace(SEQUENCE, CAUSAL).replace(TOKEN, CAUSAL)
    return {**hf, "architectures": [architecture], "tie_word_embeddings": False}


def scalar_config(hf: dict[str, Any], *, per_token: bool) -> dict[str, Any]:
    """config.json of the classifier with which a scalar model on the backbone `hf` is written."""
    architecture = backbone_config(hf)["architectures"][0].replace(CAUSAL, TOKEN if per_token else SEQUENCE)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**hf, "architectures": [architecture], **labels}


def scalar_maps(maps: list[TensorMap], hidden_size: int, *, bias: bool) -> list[TensorMap]:
    """A family's table with the head in the place of the output layer."""
    head = [replicated("output_layer.weight", "score.weight", (1, hidden_size))]
    if bias:
        head.append(replicated("output_layer.bias", "score.bias", (1,)))
    return [m for m in maps if m.name != "output_layer.weight"] + head


def tables(hf: dict[str, Any]) -> list[TensorMap]:
    """The table of tensors of a config.json, be it a language model's or a classifier's."""
    if not is_scalar(hf):
        return family_of(hf).tensor_maps(hf)
    backbone = backbone_config(hf)
    return scalar_maps(family_of(backbone).tensor_maps(backbone), hf["hidden_size"], bias=is_per_token(hf))
