"""Times the log-prob head, forward and backward, and takes its memory: stored logits against the fused heads.

    python -m tools.bench_log_probs [--tokens 1024] [--hidden 896] [--vocab 151936] [--threads 2]
    python -m tools.bench_log_probs --growth    # memory of the fused heads from 1k to 64k tokens, small vocabulary

All methods compute the mean log-prob of the labels and its gradient, by turns in one process per rank; `seconds` is the
fastest of `--repeats`, `cpu` the least processor time of a rank's threads, which says more on a machine that is shared.
`extra` is the peak of the memory above what stood before (hidden states and weight), without
the weight's gradient, which every method makes. Two ranks share the threads. With a GPU it runs there.

    products      the three matrix products alone: a floor for whoever keeps the logits
    eager         log_softmax of the logits, and gather
    core          Megatron-Core's vocab_parallel_cross_entropy of the logits
    from_logits   vocab_parallel_log_probs of the logits, without and with the entropy
    two_pass      fused_linear_log_probs, without and with the entropy
    single_pass   fused_linear_token_loss, which always has the entropy
"""

import argparse
import gc
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.device import HAS_CUDA, distributed_backend, this_device
from megatron_rl.parallel.fused_linear_log_probs import fused_linear_log_probs
from megatron_rl.parallel.fused_linear_token_loss import fused_linear_token_loss
from megatron_rl.parallel.vocab_parallel import vocab_parallel_log_probs

Method = Callable[[Tensor, Tensor, Tensor], None]


def products(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Three products, nothing else."""
    logits = hidden.detach() @ weight.detach().t()
    hidden.grad = logits @ weight.detach()
    weight.grad = logits.t() @ hidden.detach()


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """What one writes first."""
    log_probs = (hidden @ weight.t()).float().log_softmax(1)
    log_probs.gather(1, labels[:, None]).mean().backward()


def core(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Megatron-Core's; it writes the softmax over the logits."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    vocab_parallel_cross_entropy((hidden @ weight.t())[:, None], labels[:, None]).mean().backward()


def methods(vocab: int) -> dict[str, Method]:
    """By name."""
    group = dist.group.WORLD
    place = dict(group=group, vocab_size=vocab)

    def from_logits(entropy: bool) -> Method:
        def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
            vocab_parallel_log_probs(hidden @ weight.t(), labels, entropy=entropy, **place)[0].mean().backward()

        return run

    def two_pass(entropy: bool) -> Method:
        def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
            fused_linear_log_probs(hidden, weight, labels, entropy=entropy, **place)[0].mean().backward()

        return run

    def single_pass(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
        loss, *_ = fused_linear_token_loss(hidden, weight, labels, lambda lp, e, t: lp / len(labels), **place)
        loss.backward()

    found: dict[str, Method] = {"products": products, "eager": eager, "core": core}
    found |= {"from_logits": from_logits(False), "from_logits_entropy": from_logits(True)}
    found |= {"two_pass": two_pass(False), "two_pass_entropy": two_pass(True), "single_pass": single_pass}
    if dist.get_world_size() > 1:
        del found["eager"]  # knows no shards
    return found


class PeakMemory:
    """Bytes by which the process, or the device, grew at most inside the context."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if HAS_CUDA:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = (torch.cuda.max_memory_allocated() if HAS_CUDA else _status("VmHWM")) - self._before


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


Sample = tuple[float, float, int]
"""Seconds, processor seconds, extra bytes without the weight's gradient."""


def measure(run: Method, hidden: Tensor, weight: Tensor, labels: Tensor) -> Sample:
    """One forward and backward pass."""
    hidden.grad = weight.grad = None
    dist.barrier()
    with PeakMemory() as peak:
        start, cpu_start = time.perf_counter(), time.process_time()
        run(hidden, weight, labels)
        if HAS_CUDA:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds, cpu, peak.bytes - weight.numel() * weight.element_size()


def rank_main(rank: int, ranks: int, store: str, arguments: argparse.Namespace) -> None:
    """One rank: its shard of the weight, all methods by turns."""
    os.environ.update(LOCAL_RANK=str(rank))
    torch.set_num_threads(max(1, arguments.threads // ranks))
    dist.init_process_group(distributed_backend(), init_method=f"file://{store}", rank=rank, world_size=ranks)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    torch.manual_seed(0)
    dtype, device = getattr(torch, arguments.dtype), this_device()
    width = -(-arguments.vocab // ranks)
    weight = torch.randn(width, arguments.hidden, dtype=dtype, device=device).mul_(0.02).requires_grad_()
    if arguments.growth:
        _growth(weight, arguments)
    else:
        _table(weight, arguments, ranks)
    dist.barrier()
    dist.destroy_process_group()


def _table(weight: Tensor, arguments: argparse.Namespace, ranks: int) -> None:
    """All methods by turns; the first rank prints."""
    device = weight.device
    hidden = torch.randn(arguments.tokens, arguments.hidden, dtype=weight.dtype, device=device, requires_grad=True)
    labels = torch.randint(0, arguments.vocab, (arguments.tokens,), device=device)
    found = {name: m for name, m in methods(arguments.vocab).items() if name in (arguments.methods or [name])}
    results: dict[str, list[Sample]] = {name: [] for name in found}
    for _ in range(arguments.repeats):
        for name, method in found.items():
            results[name].append(measure(method, hidden, weight, labels))
    if dist.get_rank() == 0:
        _print(results, ranks)


def _growth(weight: Tensor, arguments: argparse.Namespace) -> None:
    """Extra bytes per method and number of tokens; the inputs' own gradient is [T, H]."""
    found = {name: m for name, m in methods(arguments.vocab).items() if name in ("two_pass_entropy", "single_pass")}
    tokens = 1024
    while tokens <= 65536:
        hidden = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
        labels = torch.randint(0, arguments.vocab, (tokens,), device=weight.device)
        line = f"T {tokens:6d}"
        for name, method in found.items():
            extra = measure(method, hidden, weight, labels)[2]
            own = hidden.numel() * hidden.element_size()
            line += f"   {name} {extra / 1e6:7.1f} MB, of it the gradient of the hidden states {own / 1e6:6.1f} MB"
        print(line, flush=True)
        tokens *= 4


def _print(results: dict[str, list[Sample]], ranks: int) -> None:
    best = {name: tuple(min(column) for column in zip(*runs, strict=True)) for name, runs in results.items()}
    base = "eager" if "eager" in best else "core"
    print(f"TP{ranks}   {'method':20} {'seconds':>8} {'x ' + base:>8} {'cpu':>8} {'x ' + base:>8} {'extra MB':>9}")
    for name, (seconds, cpu, extra) in best.items():
        of_base = [value / against for value, against in zip((seconds, cpu, extra), best[base], strict=True)]
        print(
            f"      {name:20} {seconds:8.3f} {of_base[0]:8.2f} {cpu:8.3f} {of_base[1]:8.2f} {extra / 1e6:9.1f} "
            f"{100 * of_base[2]:7.1f}%",
            flush=True,
        )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tensor-model-parallel-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", help="only these, beginning with eager or core; null: all")
    parser.add_argument("--growth", action="store_true", help="memory as T grows, instead of the table")
    arguments = parser.parse_args()
    if arguments.growth:
        arguments.vocab, arguments.hidden, arguments.tensor_model_parallel_sizes = 1024, 64, [1]
    context = multiprocessing.get_context("spawn")
    for ranks in arguments.tensor_model_parallel_sizes:
        with tempfile.TemporaryDirectory() as folder:
            started = [
                context.Process(target=rank_main, args=(rank, ranks, f"{folder}/store", arguments))
                for rank in range(ranks)
            ]
            for process in started:
                process.start()
            for process in started:
                process.join()


if __name__ == "__main__":
    main()
