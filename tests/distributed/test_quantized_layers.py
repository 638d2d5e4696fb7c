"""The fake-quantised policy over several ranks: the same grid as in one process, and checkpoints of an ordinary model.

A row-parallel layer's rows are split over the tensor-parallel ranks, so its scales are maxima over all of them. With
scales of a rank's own, layers round to another grid: the exact comparisons below then fail.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.checkpoint.convert import megatron_to_hf
from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig, QuantizedFormat
from megatron_rl.weights.quantized.formats import dequantize, quantize_group
from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks

SEQUENCES = [np.random.default_rng(n).integers(3, 259, size=n).tolist() for n in (2, 9, 30, 21)]
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)


def quantized_policy(rank: int, parallel: ParallelConfig, folder: Path, saved: str) -> dict[str, Any]:
    """Log-probs, the values that the first layer's row-parallel products compute with, and a checkpoint in `saved`."""
    import megatron_rl.device  # noqa: F401
    from megatron_rl.data.packing import pack, unpack
    from megatron_rl.data.samples import TrainingSequence
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy
    from megatron_rl.engine.step import forward_log_probs

    groups = initialize(parallel, seed=0)
    settings = ModelConfig(hf_path=str(folder), params_dtype=Dtype.float32, quantization=QuantizedFormat.fp8)
    policy = Policy(settings, groups, parallel)
    sequences = [TrainingSequence(np.array(s), np.ones(len(s) - 1, dtype=np.float32)) for s in SEQUENCES]
    micro_batch = pack(sequences, range(len(sequences)), pad_to_multiple=policy.token_multiple)
    ((log_probs, _),) = forward_log_probs(policy, [micro_batch])
    found: dict[str, Any] = {"log_probs": torch.cat(unpack(log_probs, micro_batch))}
    if groups.pp.rank() == 0:
        layer = policy.models[0].decoder.layers[0].mlp.linear_fc2
        inputs = torch.randn(5, 1, 256, generator=torch.Generator().manual_seed(0))
        mine = inputs.chunk(groups.tp.size(), dim=-1)[groups.tp.rank()]
        for name, values in (("weight", layer.weight_quantizer(layer.weight)), ("inputs", layer.input_quantizer(mine))):
            parts = [torch.empty_like(values) for _ in range(groups.tp.size())]
            dist.all_gather(parts, values.detach().contiguous(), group=groups.tp)
            found[name] = torch.cat(parts, dim=-1)
    if rank == 0:
        Path(saved).mkdir()
    dist.barrier()
    from megatron.core import dist_checkpointing

    dist_checkpointing.save({"model": policy.models[0].sharded_state_dict()}, saved)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3_untied", 3, **sizes)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Log-probs of one rank."""
    saved = str(tmp_path_factory.mktemp("whole") / "saved")
    (found,) = run_ranks(quantized_policy, 1, ParallelConfig(), folder, saved, timeout_s=240.0)
    log_probs: Tensor = found["log_probs"]
    return log_probs


@pytest.mark.parametrize("parallel", [TP2, PP2], ids=["tp2", "pp2"])
def test_several_ranks_compute_as_one(parallel: ParallelConfig, folder: Path, whole: Tensor, tmp_path: Path) -> None:
    found = run_ranks(quantized_policy, 2, parallel, folder, str(tmp_path / "saved"), timeout_s=240.0)

    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    stored = quantize_group(QuantizedFormat.fp8, {"weight": weight})
    torch.testing.assert_close(found[0]["weight"], dequantize(QuantizedFormat.fp8, stored), rtol=1e-6, atol=0)

    # Codes are whole-row values over the row's largest, times 448: to a float32 rounding, as the weight's.
    inputs = torch.randn(5, 1, 256, generator=torch.Generator().manual_seed(0))
    scale = inputs.abs().amax(dim=-1, keepdim=True) / 448.0
    torch.testing.assert_close(
        found[0]["inputs"], (inputs / scale).to(torch.float8_e4m3fn).float() * scale, rtol=1e-6, atol=0
    )

    # Sums in another order move a value by 1e-7, and one in some thousands then falls on the other side of the middle
    # between two points of the grid: single log-probs move by up to some hundredths, the mean by far less.
    difference = (found[-1]["log_probs"] - whole).abs()
    assert float(difference.median()) < 1e-4
    assert float(difference.mean()) < 3e-3

    # What is stored are the trained weights, under the names of any checkpoint of the model, bit for bit.
    megatron_to_hf(checkpoint=tmp_path / "saved", hf_path=folder, output=tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    original = load_file(folder / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
