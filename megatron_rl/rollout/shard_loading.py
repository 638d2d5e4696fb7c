"""Trained slices straight into the parameters of a running vLLM worker, fused and sharded as they are.

vLLM prepares weights for its kernels and, on a CPU, drops what they were prepared from. Its layerwise reload brings the
parameters back, first without memory. Here each layer gets its memory with its first slice, is filled in place, and is
prepared as soon as its last element has come, so that one layer at a time exists twice. `reload.py` does the same from
whole Hugging Face tensors, and says what vLLM forgets on a CPU; the cures are its own.

A parameter that got an element too few, or one twice, is an error that names it; the model is then unusable.

Importing this module imports vLLM; see `isolation`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

from megatron_rl.rollout.reload import forget_kernels, repack_output_weight
from megatron_rl.weights.checksum import add, checksum
from megatron_rl.weights.exchange import OnFilled
from megatron_rl.weights.messages import TransferError
from megatron_rl.weights.orders import EngineShard
from megatron_rl.weights.shard_plan import Slice

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
        self._target(piece.target)[piece.block.target_box].copy_(values)
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

    Of a layer that an earlier, failed loading has left on the meta device, the kept tensors tell what is shared.
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
