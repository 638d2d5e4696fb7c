"""vLLM inside a training process without side effects: no log lines, and the process's global state is restored.

Started as its own program, vLLM may reseed the global random generators, replace `torch.set_num_threads`, preload
libraries into every child through LD_PRELOAD, freeze the garbage collector's heap, put stand-ins for CUDA's streams
and events into torch, and write some sixty lines to the terminal. Inside a training process each of these is a bug: a
resumed run would draw other numbers, a reward's subprocess would start with vLLM's libraries. So vLLM is imported,
started and run only inside the context managers of this file.
"""

import gc
import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_VARIABLES = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
"""Set where the user has not: VLLM_LOGGING_LEVEL=INFO in the shell brings vLLM's log back."""

_TORCH_CUDA_NAMES = ("Event", "Stream", "current_stream", "stream")
"""What vLLM's CPU worker and our own `device.cpu` both replace; the latter's serve vLLM as well."""


@contextmanager
def isolated() -> Iterator[None]:
    """Import vLLM and start its engine in here.

    Restores on exit: the current CUDA stream, the random states, `torch.set_num_threads` and the number of threads,
    torch's default dtype, streams and events of `torch.cuda`, the environment but for vLLM's own variables, the warning
    filters, and the garbage collector's view of the heap.
    """
    _configure()
    environment = dict(os.environ)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    dtype = torch.get_default_dtype()
    torch_cuda = {name: getattr(torch.cuda, name) for name in _TORCH_CUDA_NAMES}
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    heap_was_frozen = gc.get_freeze_count() > 0
    # Older than `kv_cache_memory_bytes`, and it would silently win over it.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    try:
        with random_states_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        torch.set_default_dtype(dtype)
        for name, value in torch_cuda.items():
            setattr(torch.cuda, name, value)
        if stream is not None:
            # vLLM leaves its own current, and what training queues there has no order with DDP's hooks.
            torch.cuda.set_stream(stream)
        _restore(environment)
        if not heap_was_frozen:
            gc.unfreeze()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the global random states on exit.

    Sampling draws from torch's global generator at every decode step, also where each request has a seed.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def _configure() -> None:
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    # The engine core lives in this process: weights are handed over as tensors, and a death is everybody's.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # vLLM configures its logger late, when the engine starts; what it says before that goes by these levels.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # After an exception this one writes every request of the batch to the terminal, above the traceback that matters.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)


def _restore(environment: dict[str, str]) -> None:
    for name in set(os.environ) | set(environment):
        if name.startswith("VLLM_") and name not in environment:
            continue  # vLLM's own, which it may read again
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
