"""Packed micro-batches as FP8 layers get them: filled up for every layout and recipe, and whole again afterwards."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from megatron_rl.config.numerics import fp8_multiple, token_multiple
from megatron_rl.config.schema import Fp8Format, Fp8Recipe, ModelConfig, ParallelConfig
from megatron_rl.data.packing import pack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.micro_batch_part import MicroBatchPart


def groups(context_parallel_size: int, rank: int) -> Any:
    return cast(Any, SimpleNamespace(cp=SimpleNamespace(size=lambda: context_parallel_size, rank=lambda: rank)))


@pytest.mark.parametrize("recipe", [None, *Fp8Recipe])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("context_parallel_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1], [5, 16, 3], [64], [31, 33, 1, 1]])
def test_what_a_rank_multiplies_is_a_multiple_of_what_fp8_takes(
    recipe: Fp8Recipe | None, sequence_parallel: bool, context_parallel_size: int, lengths: list[int]
) -> None:
    fp8 = None if recipe is None else Fp8Format.hybrid
    model = ModelConfig(fp8=fp8, fp8_recipe=recipe)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    sequences = [TrainingSequence(np.arange(3, 4 + n), np.ones(n, dtype=np.float32)) for n in lengths]
    micro_batch = pack(sequences, range(len(lengths)), pad_to_multiple=1)
    parts = [
        MicroBatchPart.of(micro_batch, groups(context_parallel_size, rank), multiple=token_multiple(model, parallel))
        for rank in range(context_parallel_size)
    ]
    ranks_of_part = 2 if sequence_parallel else 1
    for part in parts:
        assert len(part.tokens) % ranks_of_part == 0
        assert len(part.tokens) // ranks_of_part % fp8_multiple(model) == 0
    # Joined as the ranks' outputs are, the parts give every token of the micro-batch, once and in order.
    joined = torch.cat([part.tokens for part in parts])
    restored = joined if parts[0].restore is None else joined[parts[0].restore]
    assert torch.equal(restored, micro_batch.tokens)
