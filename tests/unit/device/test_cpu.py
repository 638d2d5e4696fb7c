"""What Megatron-Core is told on a machine without CUDA, and what everybody else is told."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_rl.device import HAS_CUDA, distributed_backend, this_device
from megatron_rl.device.cpu import _MODULES_WITH_CUDA_LITERALS

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="with CUDA nothing is changed")


def as_module(name: str, source: str) -> dict:
    """Runs source as if it were the module `name`, and returns its globals."""
    namespace = {"__name__": name, "torch": torch}
    exec(source, namespace)
    return namespace


def test_this_rank_computes_on_the_cpu():
    assert this_device() == torch.device("cpu")
    assert distributed_backend() == "gloo"


def test_other_libraries_see_a_machine_without_cuda():
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")


def test_what_is_called_for_its_effect_does_nothing():
    x = torch.ones(2)
    assert x.cuda() is x
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    assert event.query()
    # Later cores evaluate this when they are imported; it needs classes.
    assert torch.cuda.Stream | None


def test_functions_are_distinct_objects():
    """Dynamo refuses one object under two names of torch."""
    named = [torch.cuda.synchronize, torch.cuda.set_device, torch.cuda.empty_cache, Tensor.record_stream]
    assert len({id(function) for function in named}) == len(named)


def test_dynamo_still_compiles():
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("name", _MODULES_WITH_CUDA_LITERALS)
def test_factories_of_core_stay_on_the_host(name):
    host_torch = importlib.import_module(f"megatron.core.{name}").torch
    assert host_torch is not torch
    for tensor in (
        host_torch.zeros(2, device="cuda"),
        host_torch.tensor([1, 2], dtype=torch.int, device="cuda:3"),
        host_torch.empty(2, pin_memory=True, device=torch.device("cuda")),
        host_torch.full((2,), 1.0, device="cpu"),
    ):
        assert tensor.device.type == "cpu"
        assert tensor.shape == (2,)
    assert host_torch.nn is torch.nn  # everything else is torch's own
    assert isinstance(torch.zeros(1), host_torch.Tensor)


def test_the_type_of_a_tensor_speaks_of_cuda_to_the_optimizer_alone():
    source = "def kind(x): return x.type()\ndef cast(x): return x.type(torch.float64)"
    optimizer = as_module("megatron.core.optimizer.any", source)
    other = as_module("some.library", source)
    x = torch.ones(1, dtype=torch.bfloat16)
    assert optimizer["kind"](x) == "torch.cuda.BFloat16Tensor"
    assert other["kind"](x) == x.type() == "torch.BFloat16Tensor"
    assert optimizer["cast"](x).dtype == other["cast"](x).dtype == torch.float64


def test_a_fork_of_cores_generator_is_reproducible_and_leaves_torchs_alone():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("ours", 5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with tracker.fork("ours"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with tracker.fork("ours"):
        second = torch.rand(3)
    expected = torch.rand(6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, expected[:3])
    assert not torch.equal(first, second)  # the fork goes on where it stopped


def test_importing_the_room_says_nothing():
    """No line of a library that is absent, on either stream."""
    code = "import megatron_rl.device, megatron.core.models.gpt, megatron.core.optimizer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("", "")
