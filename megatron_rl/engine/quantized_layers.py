"""ModelOpt's fake quantisation of the policy's layers, so that it computes as a quantised engine does.

A fake-quantised layer rounds its weight and its input to the format's grid and multiplies in the model's dtype. Scales
are taken anew from the values at every pass: one per output channel of a weight, one per token of an input, the rule by
which the weights are stored (`weights.quantization`) and by which vLLM scales its inputs. There is thus no state to
calibrate, save or send, and the policy's log-probs are the engine's. Gradients go straight through the rounding (Bengio
et al. 2013, arXiv:1308.3432), as none of the values is beyond its own scale.
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megatron_rl.config.schema import QuantizedFormat
from megatron_rl.weights.quantized.formats import INT4_GROUP, QUANTIZED_LAYERS

_SPLIT_ALONG_INPUTS = ("linear_proj", "linear_fc2")
"""Row-parallel layers: a tensor-parallel rank holds some of each row's inputs."""

_NUM_BITS: dict[QuantizedFormat, int | tuple[int, int]] = {QuantizedFormat.fp8: (4, 3), QuantizedFormat.int8: 8}


@contextlib.contextmanager
def _modelopt() -> Iterator[Any]:
    """ModelOpt's quantisation, quiet. It imports vLLM if it can, which is here a guest with a host of its own."""
    absent = "vllm" not in sys.modules
    if absent:
        sys.modules["vllm"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as mtq

            yield mtq
    finally:
        if absent:
            del sys.modules["vllm"]


def fake_quantize(model: nn.Module, format: QuantizedFormat, group: dist.ProcessGroup | None = None) -> None:
    """Make the linear layers of a GPTModel's attention and MLP compute in fp8 or int8, weights and inputs.

    Args:
        model: with its weights or without; changed in place. Its parameters keep their names, values and dtype.
        format: fp8 or int8; the weight-only formats round once and for all, see `rounded_to`.
        group: the tensor-parallel ranks, which from here on compute together; None: the model is whole.
    """
    bits = _NUM_BITS[format]
    weight = {"num_bits": bits, "axis": 0, "type": "dynamic"}
    inputs = {"num_bits": bits, "type": "dynamic", "block_sizes": {-1: None}}
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in QUANTIZED_LAYERS:
        rules += [
            {"quantizer_name": f"*{layer}.weight_quantizer", "cfg": weight, "enable": True},
            {"quantizer_name": f"*{layer}.input_quantizer", "cfg": inputs, "enable": True},
        ]
    config: Any = model.config
    names_by_layer = config.hetereogenous_dist_checkpoint
    with _modelopt() as mtq:
        mtq.quantize(model, {"quant_cfg": rules, "algorithm": None})
    config.hetereogenous_dist_checkpoint = names_by_layer
    _store_as_ordinary(model)
    if group is not None and group.size() > 1:
        for name, module in model.named_modules():
            if name.endswith(_SPLIT_ALONG_INPUTS):
                _share_scales(module.weight_quantizer, group)
                _share_scales(module.input_quantizer, group)


def _store_as_ordinary(model: nn.Module) -> None:
    """Checkpoints become those of the same model without quantisation, whose resumption and conversion know them.

    Here is no state to store. ModelOpt would name tensors layer by layer, halve those of gated MLPs, and add its
    settings to what core stores of each layer.
    """
    for module in model.modules():
        for callbacks in ("modelopt_get_extra_state_callbacks", "modelopt_set_extra_state_callbacks"):
            if hasattr(module, callbacks):
                getattr(module, callbacks).clear()
        if isinstance(module, MLP):
            ours: Any = module
            ours.sharded_state_dict = MLP.sharded_state_dict.__get__(module)


def _share_scales(quantizer: Any, group: dist.ProcessGroup) -> None:
    """A row's scale is that of its largest value on any rank: each holds a part of the row."""
    largest_here = quantizer._get_amax

    def largest(values: Tensor) -> Tensor:
        amax = largest_here(values).clone()
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        return amax

    quantizer._get_amax = largest


@torch.no_grad()
def search_awq_scales(model: nn.Module, forward: Callable[[], object]) -> dict[str, Tensor]:
    """Scales per input channel of every layer that make its int4 rounding matter least, by ModelOpt's AWQ search.

    Source: Lin et al. 2023, arXiv:2306.00978: a weight's column is multiplied by s, its input divided by s, with
    s = (mean |input|)^a over a grid of a.

    Args:
        model: a GPTModel; left as it was.
        forward: runs the model on calibration data.

    Returns:
        Module name -> [K] float32, the s of each column; what multiplies the weight and divides the input.
    """
    weight = {"num_bits": 4, "block_sizes": {-1: INT4_GROUP, "type": "static"}}
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    rules += [
        {"quantizer_name": f"*{name}.weight_quantizer", "cfg": weight, "enable": True} for name in QUANTIZED_LAYERS
    ]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with _modelopt() as mtq:
        config = {"quant_cfg": rules, "algorithm": {"method": "awq_lite", "alpha_step": 0.1}}
        mtq.quantize(model, config, lambda _: forward())
        scales: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            quantizer: Any = getattr(module, "input_quantizer", None)
            if quantizer is not None and quantizer.pre_quant_scale is not None:
                scales[name] = 1.0 / quantizer.pre_quant_scale.detach().float()
                del quantizer._pre_quant_scale
                quantizer._enable_pre_quant_scale = False
        mtq.disable_quantizer(model, "*")
    for name, parameter in model.named_parameters():
        parameter.copy_(before[name])
    return scales
