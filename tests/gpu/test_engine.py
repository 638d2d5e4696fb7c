"""vLLM on a GPU inside the training process: weights from a Megatron policy, sleep, FP8."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config.schema import QuantizedFormat
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.weights.quantized.formats import quantized_tensors
from tests.checkpoints import make_checkpoint
from tests.gpu.conftest import needs
from tests.gpu.policies import SEQUENCES, build, log_probs

pytestmark = needs("vllm")


@pytest.fixture(params=[None, QuantizedFormat.fp8], ids=str)
def engine(request: pytest.FixtureRequest, checkpoint: Path, groups: Any) -> Iterator[RolloutEngine]:
    engine = RolloutEngine(
        model_path=checkpoint, max_model_len=128, gpu_memory_utilization=0.2, quantization=request.param
    )
    engine.format = request.param  # type: ignore[attr-defined]
    yield engine
    engine.shutdown()


def test_it_computes_with_what_it_was_sent_also_after_sleep(engine: RolloutEngine, groups: Any, tmp_path: Path) -> None:
    format = engine.format  # type: ignore[attr-defined]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    for version in (1, 2):
        folder = make_checkpoint(tmp_path / str(version), "qwen3_untied", 10 + version, **sizes)
        policy = build(folder, groups, quantization=format)
        engine.sleep()
        engine.wake_up()
        tensors = policy.hf_tensors(bucket_bytes=1 << 20)
        if format is not None:
            tensors = quantized_tensors(format, tensors, policy.maps)
        engine.load_weights(tensors, version=version)
        found = torch.cat([torch.tensor(values) for values in engine.log_probs(SEQUENCES)])
        # bfloat16 on both sides, rounded at other places; in FP8 a value between two grid points goes to either.
        assert float((found - log_probs(policy)).abs().mean()) < (0.05 if format is None else 0.1)
