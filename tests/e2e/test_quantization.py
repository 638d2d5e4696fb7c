"""Quantised policies: the fake-quantised policy against the engine that holds its weights, and checkpoints of a run.

Everything runs in processes of its own: a fake-quantised model and an engine share one with torch.distributed.

Tolerances. The policy and the engine do the same arithmetic but sum in another order, which moves log-probs by about
1e-6. Where that moves an activation across the middle of two grid points, it is rounded the other way, a whole step:
such a token's log-prob, and those after it, then differ by up to some hundredths of a nat. So means are compared, and
with what quantisation itself does to them.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig, QuantizedFormat
from megatron_rl.models.capabilities import capabilities
from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks

SEQUENCES = [np.random.default_rng(n).integers(3, 259, size=n).tolist() for n in (2, 9, 30, 20)]
SIZES = {"hidden_size": 128, "intermediate_size": 256}


def policy_and_engine(rank: int, folders: list[Path], format: QuantizedFormat) -> dict[str, Any]:
    """Log-probs of `SEQUENCES`: of both policies, fake-quantised and not, and of an engine sent one, then the other."""
    import megatron_rl.device  # noqa: F401
    from megatron_rl.data.packing import pack, unpack
    from megatron_rl.data.samples import TrainingSequence
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy
    from megatron_rl.engine.step import forward_backward, forward_log_probs
    from megatron_rl.rollout.engine import RolloutEngine
    from megatron_rl.weights.quantized.formats import quantized_tensors

    groups = initialize(ParallelConfig(), seed=0)
    sequences = [TrainingSequence(np.array(s), np.ones(len(s) - 1, dtype=np.float32)) for s in SEQUENCES]
    row = pack(sequences, range(len(sequences)), pad_to_multiple=1)

    def build(folder: Path, quantization: QuantizedFormat | None) -> Policy:
        settings = ModelConfig(hf_path=str(folder), params_dtype=Dtype.float32, quantization=quantization)
        return Policy(settings, groups, ParallelConfig())

    def log_probs(policy: Policy) -> Tensor:
        return torch.cat(unpack(forward_log_probs(policy, [row])[0][0], row))

    plain = [log_probs(build(folder, None)) for folder in folders]
    assert "vllm" not in sys.modules, "ModelOpt imports vLLM, which only the engine may, in isolation"
    policies = [build(folder, format) for folder in folders]
    engine = RolloutEngine(
        model_path=folders[0], dtype="float32", max_model_len=64, kv_cache_gigabytes=0.02, quantization=format
    )
    of_engine = []
    for version, policy in enumerate([*policies, policies[0]]):
        tensors = quantized_tensors(format, policy.hf_tensors(bucket_bytes=1 << 20), policy.maps)
        engine.load_weights(tensors, version=version)
        of_engine.append(torch.cat([torch.tensor(values) for values in engine.log_probs(SEQUENCES)]))
    forward_backward(policies[0], [row], lambda log_probs, entropy, row: (-log_probs.sum(), {}))
    weight = policies[0].parameters["decoder.layers.0.mlp.linear_fc2.weight"]
    gradient = float(weight.main_grad.abs().sum())
    return {"plain": plain, "fake": [log_probs(p) for p in policies], "engine": of_engine, "gradient": gradient}


INT8 = pytest.param(
    QuantizedFormat.int8,
    marks=pytest.mark.skipif(
        not capabilities().exact_int8, reason="a CPU without VNNI: int8 products of vLLM are wrong"
    ),
)


@pytest.mark.parametrize("format", [QuantizedFormat.fp8, INT8], ids=lambda format: format.value)
def test_the_fake_quantised_policy_computes_as_the_quantised_engine(format: QuantizedFormat, tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path / str(seed), "qwen3_untied", seed, **SIZES) for seed in (1, 2)]
    (found,) = run_ranks(policy_and_engine, 1, folders, format, timeout_s=240.0)
    first, second, first_again = found["engine"]
    assert torch.equal(first, first_again), "a sync leaves nothing behind of what was sent before"
    for engine, fake, plain in zip((first, second), found["fake"], found["plain"], strict=True):
        cost = float((fake - plain).abs().mean())
        assert cost > 0.01, "quantisation shows in log-probs of random weights"
        assert float((engine - fake).abs().mean()) < 0.2 * cost
        assert float((engine - plain).abs().mean()) > 0.5 * cost
    assert found["gradient"] > 0.0, "gradients pass through the rounding"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, its prompts, and the checkpoint that its run would have exported."""
    folder = tmp_path_factory.mktemp("run")
    make_checkpoint(folder / "runs/run/hf", "qwen3_untied", 5, **SIZES)
    prompts = ["".join(chr(97 + (i * j) % 26) for j in range(24)) for i in range(1, 17)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    config = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "model": {"hf_path": str(folder / "runs/run/hf")},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 64},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def quantize(folder: Path, *commands: list[str]) -> "subprocess.CompletedProcess[str]":
    """Command lines one after another in one process, which ends at the first that fails."""
    script = (
        "import json, sys; from megatron_rl.cli.main import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"
    )
    lines = [["quantize", str(folder / "run.yaml"), *command] for command in commands]
    command = [sys.executable, "-c", script, json.dumps(lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def moved(run_folder: Path) -> dict[QuantizedFormat, dict[str, float]]:
    """What each format's command printed."""
    commands = [["--format", f.value, "--output", str(run_folder / f.value)] for f in LARGEST]
    ended = quantize(run_folder, *commands)
    assert ended.returncode == 0, ended.stderr[-4000:]
    printed = json.loads("[" + ended.stdout.replace("}\n{", "},{") + "]")
    return dict(zip(LARGEST, printed, strict=True))


LARGEST = {QuantizedFormat.fp8: 0.3, QuantizedFormat.int8: 0.1, QuantizedFormat.int4: 1.0, QuantizedFormat.nvfp4: 1.0}
"""Mean log-prob difference, nats, that a format may cost with random weights. Errors of single weights (see
test_quantization.py among the unit tests) of 4 %, 0.4 %, 7 % and 17 % of the largest weight go through two layers."""


def computed_as_stored(rank: int, folder: Path) -> dict[str, Tensor]:
    """Log-probs of `SEQUENCES[2]` by format, of policies that compute as an engine does with the written checkpoint."""
    import megatron_rl.device  # noqa: F401
    from megatron_rl.config.load import load_config
    from megatron_rl.data.packing import pack
    from megatron_rl.data.samples import TrainingSequence
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy
    from megatron_rl.engine.step import forward_log_probs
    from megatron_rl.trainer import quantize as command

    groups = initialize(ParallelConfig(), seed=0)
    hf_path = folder / "runs/run/hf"
    ids = np.array(SEQUENCES[2])
    row = pack([TrainingSequence(ids, np.ones(len(ids) - 1, dtype=np.float32))], range(1), pad_to_multiple=1)
    calibration = command._calibration_micro_batches(load_config(folder / "run.yaml", []), hf_path, 128)
    found = {}
    for format in LARGEST:
        settings = ModelConfig(hf_path=str(hf_path), params_dtype=Dtype.float32)
        policy = Policy(settings, groups, ParallelConfig(), trained=False)
        if format is QuantizedFormat.int4:
            command._scale_for_int4(policy, calibration)
        command.compute_as_stored(policy, format)
        found[format.value] = forward_log_probs(policy, [row])[0][0][: len(ids) - 1].float()
    return found


@pytest.fixture(scope="module")
def fake_quantized(run_folder: Path) -> dict[str, Tensor]:
    (found,) = run_ranks(computed_as_stored, 1, run_folder, timeout_s=240.0)
    return found


@pytest.mark.parametrize("format", LARGEST, ids=lambda format: format.value)
def test_a_quantised_checkpoint_computes_as_the_fake_quantised_policy(
    format: QuantizedFormat,
    run_folder: Path,
    moved: dict[QuantizedFormat, dict[str, float]],
    fake_quantized: dict[str, Tensor],
) -> None:
    """Loaded in transformers it is the policy that was measured, up to a part of what quantisation costs.

    Sums in another order put some activations of fp8 on the other side of a middle of the grid. transformers has nvfp4
    in bfloat16 alone, whose rounding moves log-probs of about 7 nats by some hundredths. It scales int8 activations by
    2/255 of the largest, vLLM and ModelOpt by 1/127: another grid. int8 is held against vLLM, above and below.
    """
    assert 0.005 < moved[format]["log_prob_abs_diff_mean"] < LARGEST[format]
    dtype = torch.bfloat16 if format is QuantizedFormat.nvfp4 else torch.float32
    ids = torch.tensor([SEQUENCES[2]])

    def log_probs(folder: Path) -> Tensor:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits
        return logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    quantised, plain = log_probs(run_folder / format.value), log_probs(run_folder / "runs/run/hf")
    cost = float((quantised - plain).abs().mean())
    assert 0.005 < cost < LARGEST[format]
    error = float((quantised - fake_quantized[format.value]).abs().mean())
    if format is QuantizedFormat.int8:
        assert error < 1.5 * cost, "the roundings of two grids add up as independent errors do, to sqrt(2)"
        return
    assert error < 0.2 * cost + (0.03 if dtype is torch.bfloat16 else 0.0)


def log_probs_of_vllm(rank: int, checkpoint: Path, dtype: str) -> list[float]:
    """Log-probs of `SEQUENCES[2]` by an engine that was started with the checkpoint."""
    from megatron_rl.rollout.engine import RolloutEngine

    engine = RolloutEngine(model_path=checkpoint, dtype=dtype, max_model_len=64, kv_cache_gigabytes=0.02)
    ((*found,),) = engine.log_probs([SEQUENCES[2]])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("format", [QuantizedFormat.fp8, INT8, QuantizedFormat.int4])
def test_vllm_serves_a_quantised_checkpoint(
    format: QuantizedFormat,
    run_folder: Path,
    moved: dict[QuantizedFormat, dict[str, float]],
    fake_quantized: dict[str, Tensor],
) -> None:
    """On a CPU vLLM has no nvfp4, and int4 in bfloat16 alone, whose own rounding is some hundredths of a nat."""
    in_bfloat16 = format is QuantizedFormat.int4
    dtype = "bfloat16" if in_bfloat16 else "float32"
    (found,) = run_ranks(log_probs_of_vllm, 1, run_folder / format.value, dtype, timeout_s=240.0)
    error = float((torch.tensor(found) - fake_quantized[format.value]).abs().mean())
    assert error < 0.2 * moved[format]["log_prob_abs_diff_mean"] + 0.03 * in_bfloat16


def test_a_checkpoint_that_is_not_there_is_a_users_mistake(run_folder: Path) -> None:
    ended = quantize(run_folder, ["--format", "fp8", "--output", "unused", "--hf-path", "nowhere"])
    assert ended.returncode == 2
    assert ended.stderr.startswith("megatron-rl: error: --hf-path: given 'nowhere'")
