"""Megatron-Core on a CPU: replacements for the places where core uses CUDA.

Core is written for CUDA in three ways, the same in 0.16 to 0.19; only the lines move:

1. functions of `torch.cuda` and `Tensor.cuda()` called for their effect (current device, streams, events, RNG state);
2. the literal `device="cuda"` or `pin_memory=True` in a tensor factory;
3. `tensor.type()` compared with `'torch.cuda.FloatTensor'` in the optimizer.

Each is replaced once here: (1) by host equivalents put into `torch.cuda`, (2) by a view of `torch` whose factories
stay on the host, put into the globals of the modules concerned, (3) by a `Tensor.type` that names CUDA types to the
optimizer alone. Core's `torch.compile` decorators are switched off: on a CPU they cost seconds of compilation for
fusions that only pay on a GPU.

A fourth difference is in collectives: core exchanges the tokens of experts between ranks that hold different numbers of
them, when experts are split over tensor-parallel ranks of their own. NCCL can gather and reduce-scatter unequal parts,
gloo cannot; `gather_unequal` and `reduce_scatter_unequal` do it.

`torch.cuda.is_available()` stays False, so other libraries in the process (vLLM, transformers) see a CPU machine.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_unequal(part: Tensor, group: ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """[sizes[rank], ...] of every rank -> [sum(sizes), ...], in rank order; parts travel filled up to the largest."""
    longest = max(sizes)
    sent = part.new_zeros(longest, *part.shape[1:])
    sent[: len(part)] = part
    gathered = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(gathered, sent, group=group)
    return torch.cat([whole[:size] for whole, size in zip(gathered, sizes, strict=True)])


def reduce_scatter_unequal(whole: Tensor, group: ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """[sum(sizes), ...] of every rank -> the sum over the ranks, of which each keeps its [sizes[rank], ...]."""
    total = whole.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total.split(list(sizes))[group.rank()].clone()


def prepare_uneven_collectives() -> None:
    """Let core's functions fall back on those above where parts are unequal."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(input_: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        return gather_unequal(input_, group, [int(size) for size in output_split_sizes])

    def scatter_any(input_: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        return reduce_scatter_unequal(input_, group, [int(size) for size in input_split_sizes])

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, scatter_any


# Modules of core with a literal device="cuda" or pin_memory=True on paths that a CPU reaches.
_MODULES_WITH_CUDA_LITERALS = (
    "pipeline_parallel.schedules",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "utils",
    "transformer.utils",
    "transformer.moe.moe_utils",
    "dist_checkpointing.exchange_utils",
    "models.common.embeddings.rope_utils",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like")


class _HostStream:
    """Stands for a CUDA stream: host work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return _HostEvent() if event is None else event

    def synchronize(self) -> None:
        pass


class _HostEvent:
    """Stands for a CUDA event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def _host_stream_context(stream: Any) -> Iterator[None]:
    yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Effect that a host does not need."""


def _distinct(function: Callable[..., Any]) -> Callable[..., Any]:
    # Dynamo refuses the same function object under two names of torch ("Duplicate torch object").
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


def _answer_torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, _distinct(_nothing))
    # Stream and Event stay classes: later cores evaluate `torch.cuda.Stream | None` when imported.
    cuda.Stream, cuda.Event = _HostStream, _HostEvent
    cuda.current_stream = lambda device=None: _HostStream()
    cuda.default_stream = lambda device=None: _HostStream()
    cuda.stream = _host_stream_context
    cuda.nvtx.range_push = _distinct(_nothing)
    cuda.nvtx.range_pop = _distinct(_nothing)
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = _distinct(_nothing)


def _on_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    def host_factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return host_factory


class _HostTorch(types.ModuleType):
    """`torch`, with factories that stay on the host."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_host(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _answer_tensor_type() -> None:
    original = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = tensor_type  # type: ignore[assignment,method-assign]


def _answer_token_dispatcher() -> None:
    """The counts of tokens that experts exchange come as numpy arrays only from a GPU; the exchange needs them so."""
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = dispatcher.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    dispatcher.maybe_move_tensor_to_cpu = to_host


def prepare_megatron_for_cpu() -> None:
    """Make Megatron-Core run on CPU tensors and gloo in this process. Called once, on import of the room."""
    _answer_torch_cuda()
    _answer_tensor_type()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # core warns of every GPU library that is absent
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
        random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
        host_torch = _HostTorch()
        for name in _MODULES_WITH_CUDA_LITERALS:
            module: Any = importlib.import_module(f"megatron.core.{name}")
            module.torch = host_torch
        _answer_token_dispatcher()
        prepare_uneven_collectives()
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    # Core reports "CPU RNG state changed within GPU RNG context" at every fork; here the two are one by design.
    importlib.import_module("logging").getLogger(random.__name__).setLevel("ERROR")
