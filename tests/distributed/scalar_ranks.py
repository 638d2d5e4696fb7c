"""What spawned ranks do with scalar models."""

from pathlib import Path

import numpy as np

import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
from megatron_rl.checkpoint.hf_export import export_hf
from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
from megatron_rl.data.packing import pack, unpack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.initialize import initialize
from megatron_rl.engine.scalar_model import ScalarModel
from megatron_rl.engine.step import forward_values
from tests.distributed.training_ranks import LAYOUTS


def start_scalar_model(checkpoint: Path, layout: str, *, per_token: bool) -> ScalarModel:
    """Join the world at a layout and build the float32 model of a checkpoint."""
    parallel = ParallelConfig(**LAYOUTS[layout][1])
    groups = initialize(parallel, seed=1)
    settings = ModelConfig(hf_path=str(checkpoint), params_dtype=Dtype.float32)
    return ScalarModel(settings, groups, parallel, per_token=per_token)


def values_of(
    rank: int, checkpoint: Path, layout: str, per_token: bool, sequences: list[list[int]]
) -> list[np.ndarray]:
    """The value of every token; the last token of each sequence is read too, its label is no token of it."""
    model = start_scalar_model(checkpoint, layout, per_token=per_token)
    training = [TrainingSequence(np.array([*s, 0]), np.ones(len(s), dtype=np.float32)) for s in sequences]
    micro_batch = pack(training, range(len(training)), pad_to_multiple=2)
    (values,) = forward_values(model, [micro_batch])
    return [part.numpy() for part in unpack(values, micro_batch)]


def export_scalar(rank: int, checkpoint: Path, layout: str, per_token: bool, output: Path) -> None:
    """Import a classifier at a layout and export it again."""
    export_hf(start_scalar_model(checkpoint, layout, per_token=per_token), output)
