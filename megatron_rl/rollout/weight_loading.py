"""New weights into a running vLLM model, exactly: the model afterwards equals one that was loaded with them.

`reload_weights` takes whole Hugging Face tensors; `ShardLoader` and `load_shards` take slices of a weight sync.

vLLM prepares weights for its kernels and, on a CPU, drops the originals. Its layerwise reload puts the parameters on
the meta device, fills one layer after another, and prepares each as after the first load. On a CPU it leaves behind,
without an error:

    tied output weights     packed from the old embedding, which the reload replaces later
    mixture-of-experts      new weights unpacked, in a tensor that the kernel reads as packed
    GPT-OSS                 experts and sinks unchanged: their loader copies into a tensor on the meta device
    a missing tensor        the old values, with a warning; a missing third of a fused q/k/v, without

`reload_weights` repairs the first three and refuses the last. Whether anything else was missed the caller finds out by
comparing log-probs: packed weights have no bytes to take a checksum of.

`ShardLoader` allocates each layer's memory with its first slice, fills it in place, and has it prepared as soon as its
last element has come, so that one layer at a time exists twice. A parameter with an element missing or written twice is
an error that names it; the model is then unusable.

Importing this module imports vLLM; see `isolation.py`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
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

from megatron_rl.weights.plan.rank_plan import EngineShard
from megatron_rl.weights.plan.shard_plan import Slice
from megatron_rl.weights.transport.exchange import OnFilled
from megatron_rl.weights.transport.messages import TransferError, add, checksum

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
    """The same tensors; RuntimeError for a name that comes again, which vLLM would read without an error."""
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


_NEVER_ON_META = ("bias", "e_score_correction_bias")
"""Parameters that vLLM's layerwise reload leaves where they are."""


@dataclass
class _Layer:
    module: nn.Module
    missing: int = 0
    targets: list[str] = field(default_factory=list)


class ShardLoader:
    """Loads one version into a worker's model. Use as a context: entering prepares the model, leaving completes it."""

    def __init__(self, worker: Any, shard: EngineShard, *, on_filled: OnFilled | None = None) -> None:
        """Args:
        worker: vLLM's worker of this rank, with no request running.
        shard: what will come.
        on_filled: called with each target's name and values when all of it has come, before vLLM prepares it.

        Raises:
            TransferError: the plan's parameters are not the model's; the first difference is named.
        """
        self._model, self._model_config = worker.model_runner.model, worker.model_config
        self._vllm_config = worker.vllm_config
        self._shard, self._on_filled = shard, on_filled
        self._stack = ExitStack()
        self._layers: dict[str, _Layer] = {}
        self._places: dict[str, tuple[str, str, int | None]] = {}
        self._expected: dict[str, int] = {}
        self._missing = {name: torch.Size(shape).numel() for name, shape in shard.shapes.items()}
        for name, dim, _, size in shard.zeros:
            self._missing[name] -= size * torch.Size(shard.shapes[name]).numel() // shard.shapes[name][dim]
        self._complete: list[str] = []
        self._locate()

    def __enter__(self) -> "ShardLoader":
        self._stack.enter_context(set_current_vllm_config(self._vllm_config))
        self._stack.enter_context(torch.no_grad())
        if current_platform.is_cpu():
            forget_kernels(self._model)
        initialize_layerwise_reload(self._model)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._stack:
            if kind is not None:
                return
            if missing := next((name for name, count in self._missing.items() if count), None):
                raise TransferError(f"weights for the engine lack {self._missing[missing]} elements of {missing}")
            finalize_layerwise_reload(self._model, self._model_config)
            if current_platform.is_cpu():
                repack_output_weight(self._model)

    def write(self, piece: Slice, values: Tensor, expected: int | None) -> None:
        """Copy a slice to its place."""
        self._target(piece.target)[piece.block.target_index].copy_(values)
        if expected is not None:
            self._expected[piece.target] = add(self._expected.get(piece.target, 0), expected)
        self._missing[piece.target] -= piece.block.numel
        if self._missing[piece.target] < 0:
            raise TransferError(f"weights for the engine hold elements of {piece.target} twice")
        layer = self._layers[self._places[piece.target][0]]
        layer.missing -= piece.block.numel
        if not layer.missing:
            self._complete.append(self._places[piece.target][0])

    def end_bucket(self) -> None:
        """Check the layers that are complete, and let vLLM prepare them."""
        # vLLM prepares a module with all that lies in it: an attention with sinks waits for its projections.
        waiting = [name for name in self._complete if any(layer.missing for layer in self._inside(name))]
        ready = [name for name in self._complete if name not in waiting]
        for name in ready:
            for target in self._layers[name].targets:
                self._check(target)
        for name in sorted(ready, key=lambda name: -name.count(".")):
            module = self._layers[name].module
            info = get_layerwise_info(module)
            if info.can_load():
                info.load_numel = 1  # counts as loaded in part, so that finalising prepares the layer
                finalize_layerwise_reload(module, self._model_config)
        self._complete = waiting

    def _inside(self, name: str) -> Iterator[_Layer]:
        return (layer for other, layer in self._layers.items() if other.startswith(f"{name}."))

    def _check(self, target: str) -> None:
        values = self._target(target)
        if target in self._expected and checksum(values) != self._expected[target]:
            raise TransferError(f"the engine's {target} is not what was sent: their checksums differ")
        if self._on_filled is not None:
            self._on_filled(target, values)

    def _target(self, name: str) -> Tensor:
        """A target's memory, padding zeroed."""
        module_name, parameter, row = self._places[name]
        module = self._layers[module_name].module
        if getattr(module, parameter).is_meta:
            materialize_layer(module, get_layerwise_info(module))
            of_module = set(self._layers[module_name].targets)
            for target, dim, start, size in self._shard.zeros:
                if target in of_module:
                    self._target(target).narrow(dim, start, size).zero_()
        tensor: Tensor = getattr(module, parameter)
        return tensor if row is None else tensor[row]

    def _locate(self) -> None:
        """Find each target's layer, and compare shapes. Parameters that vLLM shares between layers count once."""
        modules = dict(self._model.named_modules())
        left = _parameters(modules)
        rows: Counter[str] = Counter()
        for name, shape in self._shard.shapes.items():
            full, _, number = name.partition("[")
            module_name, _, parameter = full.rpartition(".")
            row = self._shard.expert_rows[int(number[:-1])] if number else None
            found = _shape(modules.get(module_name), parameter)
            if found is None or (found if row is None else found[1:]) != shape:
                raise TransferError(f"{name}: the plan has shape {shape}, vLLM's model {found}; it fuses otherwise")
            rows[full] += row is not None
            left.discard(full)
            layer = self._layers.setdefault(module_name, _Layer(modules[module_name]))
            layer.missing += self._missing[name]
            layer.targets.append(name)
            self._places[name] = (module_name, parameter, row)
        if left:
            raise TransferError(f"vLLM's model has {min(left)}, which the plan does not know")
        for full, count in rows.items():
            module_name, _, parameter = full.rpartition(".")
            held = _shape(modules[module_name], parameter)
            if count and held is not None and held[0] != count:
                raise TransferError(f"{full}: the plan has {count} experts, vLLM's model {held[0]}")


def _shape(module: nn.Module | None, parameter: str) -> tuple[int, ...] | None:
    """Shape of a parameter as vLLM first loaded it."""
    if module is None:
        return None
    parameters, buffers = get_layerwise_info(module).restore_metadata
    tensor = (parameters | buffers).get(parameter, getattr(module, parameter, None))
    return None if tensor is None else tuple(tensor.shape)


def _parameters(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of what a checkpoint brings: shared parameters once, and not those that vLLM makes from others.

    Of a layer that an earlier, failed loading has left on the meta device, the kept tensors say what is shared.
    """
    seen: set[int] = set()
    names: set[str] = set()
    for module_name, module in modules.items():
        info = get_layerwise_info(module)
        kept = info.kernel_tensors[0] if info.kernel_tensors is not None else module._parameters
        for name, parameter in kept.items():
            in_checkpoint = name in info.restore_metadata[0] or name in _NEVER_ON_META
            if parameter is not None and in_checkpoint and id(parameter) not in seen:
                seen.add(id(parameter))
                names.add(f"{module_name}.{name}")
    return names


def load_shards(
    worker: Any, shard: EngineShard, feed: Callable[[ShardLoader], None], on_filled: OnFilled | None = None
) -> None:
    """Load one version into vLLM's worker; to be called through `collective_rpc`, with no request running.

    Args:
        worker: vLLM's worker of this rank.
        shard: what will come.
        feed: writes every slice to the loader that it is given, and ends its buckets.
        on_filled: see `ShardLoader`.
    """
    with ShardLoader(worker, shard, on_filled=on_filled) as loader:
        feed(loader)
