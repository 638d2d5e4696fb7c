"""AWQ's scales folded into the layers before, so that a checkpoint needs no operation of its own for them.

A scaled layer computes (W diag(s)) (x / s), the same as W x. The division is done for nothing where x comes out of
something linear in its own parameters: a norm's weight, or the rows of the up projection, which the gated activation
multiplies. What attention's output projection reads is mixed from the values of several heads that share a group, so
its scales have no home; it stays unscaled.
"""

import re

import torch
from torch import Tensor

_LAYER = re.compile(r"^(decoder\.layers\.\d+)\.(?:self_attention|mlp)\.(linear_\w+)$")


@torch.no_grad()
def fold_awq_scales(parameters: dict[str, Tensor], scales: dict[str, Tensor], *, norms: bool, gated: bool) -> None:
    """Scale the columns of the weights in `parameters` and undo it in the layer before; the model stays the same.

    Args:
        parameters: whole (unsharded) Megatron parameters by table name; changed in place.
        scales: module name -> [K], what multiplies the columns of its weight.
        norms: the norms have no bias and their weight is the whole factor, as RMSNorm's.
        gated: the MLP multiplies the up projection, the second half of linear_fc1's rows, into the activation.
    """
    for name, scale in scales.items():
        match = _LAYER.match(name)
        if match is None:
            continue
        layer, kind = match.groups()
        if kind == "linear_fc2":
            fc1 = f"{layer}.mlp.linear_fc1"
            if not gated or f"{fc1}.bias" in parameters:
                continue
            before = parameters[f"{fc1}.weight"].chunk(2)[1]
            before.div_(scale.to(before.dtype)[:, None])
        elif kind in ("linear_qkv", "linear_fc1") and norms:
            norm = "input_layernorm" if kind == "linear_qkv" else "pre_mlp_layernorm"
            before = parameters[f"{layer}.{norm}.weight"]
            before.div_(scale.to(before.dtype))
        else:
            continue
        weight = parameters[f"{name}.weight"]
        weight.mul_(scale.to(weight.dtype))
