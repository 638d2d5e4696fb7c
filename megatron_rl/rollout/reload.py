"""New weights into a running vLLM model, exactly: the model afterwards equals one loaded from those weights.

vLLM's layerwise reload puts the parameters on the meta device, lets the model's own loader fill one layer after
another, and packs each for its kernels as after the first load. On a CPU it leaves behind, without an error:

    tied output weights     packed from the old embedding, which the reload replaces later
    mixture-of-experts      new weights unpacked, in a tensor that the kernel reads as packed
    GPT-OSS                 experts and sinks unchanged: their loader copies into a tensor on the meta device
    a missing tensor        the old values, with a warning; a missing third of a fused q/k/v, without

`reload_weights` repairs the first three and refuses the last. That nothing else was forgotten is for the caller to
prove by comparing log-probs: packed weights have no bytes to take a checksum of.

Importing this module imports vLLM; see `isolation`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

_LOADED_BY_COPY = ("GptOssRoutedExperts", "OAIAttention")
_DERIVED = (".azp_adj", ".W_UK_T", ".W_UV")
"""Parameters of quantised layers and of latent attention that vLLM computes from others, and no checkpoint has."""


def reload_weights(worker: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the weights of vLLM's worker; to be called through `collective_rpc`, with no request running.

    Args:
        worker: vLLM's worker of this rank.
        named_tensors: Hugging Face name and full (unsharded) tensor of every parameter, in any order and dtype.
            Consumed in order, once, to its end. A tensor must keep its values until this function returns: a layer is
            filled when its last tensor has come.

    Raises:
        RuntimeError: a tensor came twice or not at all. The model is then unusable.
    """
    model = worker.model_runner.model
    expected = {name for name, _ in model.named_parameters() if not name.endswith(_DERIVED)}
    tensors = each_once(named_tensors)
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        if current_platform.is_cpu():
            forget_kernels(model)
        initialize_layerwise_reload(model)
        if current_platform.is_cpu():
            _materialize_layers_loaded_by_copy(model)
            _keep_scales_of_int8_kernels(model)
        loaded = model.load_weights(tensors)
        if unread := next(tensors, None):
            raise RuntimeError(f"the engine's model did not read all weights: it stopped before {unread[0]}")
        _require_complete(model, expected - loaded)
        finalize_layerwise_reload(model, worker.model_config)
        if current_platform.is_cpu():
            repack_output_weight(model)


def each_once(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; RuntimeError for a name that comes again, which vLLM would read without a word."""
    seen: set[str] = set()
    for name, tensor in named_tensors:
        if name in seen:
            raise RuntimeError(f"weights for the engine hold {name} twice")
        seen.add(name)
        yield name, tensor


def _require_complete(model: nn.Module, missing: set[str]) -> None:
    """`missing` has parameters of which nothing came; of fused ones (q/k/v, gate/up) a part may have."""
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if isinstance(layer, LinearBase) and info.can_load() and info.load_numel < info.load_numel_total:
            missing.add(f"{name} ({info.load_numel} of {info.load_numel_total} elements)")
    if missing:
        raise RuntimeError(f"weights for the engine lack {', '.join(sorted(missing))}")


def forget_kernels(model: nn.Module) -> None:
    """Weights packed for a CPU's kernels: a model would hold the old and the new ones of its largest layer at once, and
    those of experts are packed when their kernel is made, and only then."""
    for layer in model.modules():
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = None  # type: ignore[assignment]
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _materialize_layers_loaded_by_copy(model: nn.Module) -> None:
    for layer in model.modules():
        if type(layer).__name__ in _LOADED_BY_COPY:
            info = get_layerwise_info(layer)
            materialize_layer(layer, info)
            info.load_numel = 1  # counts as loaded, so that finalize does not put the old tensors back


def _keep_scales_of_int8_kernels(model: nn.Module) -> None:
    """oneDNN's int8 product points at the scales that it was made with, and a reload frees those: it would read nan."""

    def keeping(process: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def process_and_keep(layer: nn.Module) -> None:
            process(layer)
            layer.scales_of_kernel = layer.weight_scale.data

        return process_and_keep

    for layer in model.modules():
        kernel: Any = getattr(getattr(layer, "scheme", None), "kernel", None)
        if isinstance(kernel, CPUInt8ScaledMMLinearKernel) and not hasattr(layer, "scales_of_kernel"):
            kernel.process_weights_after_loading = keeping(kernel.process_weights_after_loading)  # type: ignore[method-assign]


def repack_output_weight(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
