"""How long training stands still for a checkpoint: synchronous and asynchronous.

    python -m tools.bench_checkpoint [--parameters-m 500] [--folder FOLDER] [--saves 3]

One rank, a random Qwen3-style model with float32 weights and AdamW's two moments, a save after each of a few steps.
"Stands still" is the time inside the call that saves, on the training thread. The first asynchronous save also pays for
the memory of its copy; the later ones do not. Between saves the tool waits, as training would compute, until the
checkpoint is complete.
"""

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
warnings.simplefilter("ignore")

import torch.distributed as dist  # noqa: E402

import megatron_rl.device  # noqa: E402, F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.checkpoint import training_state  # noqa: E402
from megatron_rl.checkpoint.training_state import POLICY, Trained  # noqa: E402
from megatron_rl.checkpoint.writer import CheckpointWriter  # noqa: E402
from megatron_rl.config.schema import Dtype, ModelConfig, OptimizerConfig, ParallelConfig  # noqa: E402
from megatron_rl.engine.initialize import finalize, initialize  # noqa: E402
from megatron_rl.engine.optimizer import Optimizer  # noqa: E402
from megatron_rl.engine.policy import Policy  # noqa: E402
from tools.make_arithmetic import main as make_arithmetic  # noqa: E402


def build(folder: Path, millions: float) -> Trained:
    """A model of about that many million parameters, with an optimizer that has its moments."""
    hidden, layers = 1024, max(1, round(millions / 14.7))  # a layer of these sizes has 14.7 million parameters
    sizes = ["--hidden-size", str(hidden), "--num-layers", str(layers), "--intermediate-size", str(4 * hidden)]
    make_arithmetic([str(folder), *sizes, "--num-sft", "1", "--num-train", "1", "--num-heldout", "1"])
    groups = initialize(ParallelConfig(), seed=1)
    model = ModelConfig(hf_path=str(folder / "model"), params_dtype=Dtype.float32, load_weights=False)
    policy = Policy(model, groups, ParallelConfig())
    return Trained(policy, Optimizer(OptimizerConfig(), policy, num_steps=1))


def measure(folder: Path, trained: Trained, *, asynchronous: bool, saves: int) -> tuple[list[float], list[float]]:
    """(seconds inside the call, seconds until complete) of each save."""
    writer = CheckpointWriter(folder, asynchronous=asynchronous, keep_last=1)
    inside, complete = [], []
    for step in range(1, saves + 1):
        start = time.perf_counter()
        writer.save(step, training_state.to_save({POLICY: trained}, {"step": step}))
        inside.append(time.perf_counter() - start)
        writer.finish()
        complete.append(time.perf_counter() - start)
    return inside, complete


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters-m", type=float, default=500.0, help="millions of parameters")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder")
    parser.add_argument("--saves", type=int, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        trained = build(folder / "material", arguments.parameters_m)
        shutil.rmtree(folder / "material")
        count = sum(parameter.numel() for parameter in trained.model.models[0].parameters())
        print(f"{count / 1e6:.0f} million parameters, {12 * count / 1e9:.1f} GB with the moments")
        results = {}
        for kind in ("synchronous", "asynchronous"):
            inside, complete = measure(
                folder / kind, trained, asynchronous=kind == "asynchronous", saves=arguments.saves
            )
            shutil.rmtree(folder / kind)
            results[kind] = statistics.median(inside[1:] or inside)
            print(f"{kind:<13} stands still {_shown(inside)}   complete after {_shown(complete)}")
        ratio = results["asynchronous"] / results["synchronous"]
        print(f"asynchronous / synchronous: {100 * ratio:.1f}% (medians, without the first save)")
    finalize()


def _shown(seconds: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in seconds) + " s"


if __name__ == "__main__":
    main()
