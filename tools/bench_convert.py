"""Import and export of a generated 1.5B-parameter checkpoint at TP2: seconds, peak memory, the disk's copy speed.

    python -m tools.bench_convert [--layers 28]

Two ranks build their part of the model, import its weights and export them again. Memory is what a process holds for
itself (RssAnon of /proc/self/status, the page cache left out), at its peak while the model is built and imported, less
what it held before; it is to be the shard and at most one tensor. The same files are copied in the same run, by one
process, for comparison: once before and once after, of which the mean is told. All begin with files that the page cache
has forgotten, and end when what they wrote is on the disk. Everything goes to a temporary folder, which is deleted.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.checkpoint.hf_export import export_hf
from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.policy import Policy
from megatron_rl.models.families import family_of
from megatron_rl.weights.files.hf_writer import ExportPlan
from tests.distributed.spawn import run_ranks

# The sizes of Qwen2.5-1.5B, untied.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 4096,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


class PeakMemory:
    """Peak of the process's own memory inside the context, above what it was, bytes."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def convert(rank: int, source: str, output: str) -> dict[str, float]:
    """One rank: build, import, export."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    # Without weights, and without drawing any: as they are when they are about to be read.
    drawn = {"perform_initialization": False}
    model = ModelConfig(hf_path=source, params_dtype=Dtype.bfloat16, load_weights=False, transformer_config=drawn)
    groups = initialize(parallel, seed=0)
    with PeakMemory() as memory:
        policy = Policy(model, groups, parallel, trained=False)
        torch.distributed.barrier()
        begin = time.perf_counter()
        policy.load_hf_weights(Path(source))
        torch.distributed.barrier()
        imported = time.perf_counter()
    shard = sum(p.numel() * p.element_size() for p in policy.parameters.values())
    export_hf(policy, Path(output))
    settle(Path(output))
    torch.distributed.barrier()
    exported = time.perf_counter()
    return {
        "import_s": imported - begin,
        "export_s": exported - imported,
        "shard": shard,
        "peak": memory.peak - memory.before,
    }


def settle(folder: Path) -> None:
    """Write a folder's files to the disk and let the page cache forget them."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_seconds(source: Path, target: Path) -> float:
    """Of copying a folder; the copy is deleted."""
    settle(source)
    begin = time.perf_counter()
    shutil.copytree(source, target)
    settle(target)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    arguments = parser.parse_args()
    hf = {**CONFIG, "num_hidden_layers": arguments.layers}
    with tempfile.TemporaryDirectory() as root:
        source, output = Path(root, "source"), Path(root, "output")
        source.mkdir()
        (source / "config.json").write_text(json.dumps(hf))
        plan = ExportPlan(family_of(hf).tensor_maps(hf), lambda name: torch.bfloat16)
        plan.create(source)
        largest = max(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in plan.tensors.values())
        for file in plan.files:
            with (source / file.name).open("r+b") as stream:
                stream.seek(len(file.header))
                for begin in range(len(file.header), file.num_bytes, 1 << 24):
                    count = min(1 << 24, file.num_bytes - begin)
                    stream.write(torch.randint(256, (count,), dtype=torch.uint8).numpy().data)
        copies = [copy_seconds(source, Path(root, "copy"))]
        settle(source)
        ranks = run_ranks(convert, 2, str(source), str(output), timeout_s=400.0)
        copies.append(copy_seconds(source, Path(root, "copy")))
        same = all((source / f.name).read_bytes() == (output / f.name).read_bytes() for f in plan.files)
    megabytes, copied = plan.num_bytes / 1e6, sum(copies) / len(copies)
    speeds = " and ".join(f"{megabytes / seconds:.0f}" for seconds in copies)
    print(f"{megabytes:.0f} MB in {len(plan.files)} files; copied at {speeds} MB/s")
    for way in ("import", "export"):
        speed = megabytes / max(rank[f"{way}_s"] for rank in ranks)
        print(f"{way}: {speed:.0f} MB/s, {speed * copied / megabytes:.2f} of the copy")
    for rank, values in enumerate(ranks):
        peak, shard = values["peak"] / 1e6, values["shard"] / 1e6
        print(f"rank {rank}: peak {peak:.0f} MB = shard {shard:.0f} MB + {peak - shard:.0f} MB")
    print(f"largest tensor {largest / 1e6:.0f} MB; the export is {'the same bytes' if same else 'NOT the same bytes'}")


if __name__ == "__main__":
    main()
