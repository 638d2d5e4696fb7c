"""A trained policy as a quantised Hugging Face checkpoint, and what the rounding does to it on the run's own prompts.

    load -> log-probs -> int4: search and fold scales -> write, rounded once -> compute as stored -> log-probs

The difference of the two log-probs is what the format costs. fp8 and int8 quantise activations as they come, so they
have nothing to calibrate; int4's scales (AWQ) are searched on the prompts.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.checkpoint.convert import world_of_one
from megatron_rl.checkpoint.hf_export import checkpoint_dtype
from megatron_rl.config.errors import UserError
from megatron_rl.config.hf_checkpoint import check_weights, read_json_object
from megatron_rl.config.schema import Config, Dtype, ModelConfig, ParallelConfig, QuantizedFormat
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.datasets import load_prompts
from megatron_rl.data.packing import MicroBatch, pack, plan_micro_batches, unpack
from megatron_rl.data.samples import TrainingSequence
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.quantized_layers import fake_quantize, search_awq_scales
from megatron_rl.engine.step import forward_log_probs
from megatron_rl.runs.directory import RunDirectory
from megatron_rl.weights.files.hf_writer import write_hf_checkpoint
from megatron_rl.weights.quantized.formats import (
    dequantize,
    fold_awq_scales,
    is_quantized,
    quantization_config,
    quantize_group,
    quantized_tensors,
    refusal,
)

_BUCKET_BYTES = 1 << 30
_DTYPES = {torch.float32: Dtype.float32, torch.bfloat16: Dtype.bfloat16}


def quantize(
    config: Config, *, format: QuantizedFormat, output: Path, hf_path: Path | None, num_prompts: int
) -> dict[str, float]:
    """Write the quantised checkpoint of a run's export; the whole model in this process.

    Args:
        config: of the run; its training prompts are the calibration data.
        format: of the weights.
        output: folder, replaced when the new one is complete.
        hf_path: checkpoint to quantise; None: the run's export.
        num_prompts: the first so many training prompts are used.

    Returns:
        `log_prob_abs_diff_mean` and `log_prob_abs_diff_max` over the prompts' tokens, nats: quantised against not.

    Raises:
        UserError: there is no such checkpoint, or its model cannot be stored in the format.
    """
    folder = hf_path or RunDirectory(Path(config.output_dir) / config.name).hf_dir
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--hf-path: given '{folder}', which has no config.json; allowed: a run's hf/ or another checkpoint"
        )
    check_weights(folder, "--hf-path")
    hf = read_json_object(folder / "config.json", "--hf-path")
    if hf.get("quantization_config"):
        raise UserError(f"--hf-path: given '{folder}', which is quantised already; allowed: one that is not")
    dtype = checkpoint_dtype(hf)
    if dtype not in _DTYPES:
        raise UserError(f"--hf-path: given dtype {dtype} in '{folder}'; allowed: float32, bfloat16")
    with world_of_one() as groups:
        settings = ModelConfig(hf_path=str(folder), params_dtype=_DTYPES[dtype])
        policy = Policy(settings, groups, ParallelConfig(), trained=False)
        if reason := refusal(format, policy.maps):
            raise UserError(f"--format: given {format.value}; {reason}")
        micro_batches = _calibration_micro_batches(config, folder, num_prompts)
        before = _log_probs(policy, micro_batches)
        if format is QuantizedFormat.int4:
            _scale_for_int4(policy, micro_batches)
        tensors = quantized_tensors(format, policy.hf_tensors(bucket_bytes=_BUCKET_BYTES), policy.maps)
        described = policy.hf | {"quantization_config": quantization_config(format)}
        write_hf_checkpoint(output, tensors, source=folder, config=described)
        compute_as_stored(policy, format)
        difference = (_log_probs(policy, micro_batches) - before).abs()
    return {"log_prob_abs_diff_mean": float(difference.mean()), "log_prob_abs_diff_max": float(difference.max())}


@torch.no_grad()
def compute_as_stored(policy: Policy, format: QuantizedFormat) -> None:
    """Make an unsharded policy compute as an engine does with its quantised checkpoint."""
    if format in (QuantizedFormat.fp8, QuantizedFormat.int8):
        for model in policy.models:
            fake_quantize(model, format)
        return
    for tensor_map in filter(is_quantized, policy.maps):
        weight = policy.parameters[tensor_map.name]
        weight.copy_(dequantize(format, quantize_group(format, {"weight": weight})))


def _scale_for_int4(policy: Policy, micro_batches: Sequence[MicroBatch]) -> None:
    scales = search_awq_scales(policy.models[0], lambda: _log_probs(policy, micro_batches))
    model = policy.config
    norms = model.normalization == "RMSNorm" and not model.layernorm_zero_centered_gamma
    fold_awq_scales(policy.parameters, scales, norms=norms, gated=model.gated_linear_unit)


def _calibration_micro_batches(config: Config, folder: Path, num_prompts: int) -> list[MicroBatch]:
    limit = config.data.max_prompt_tokens
    prompts = load_prompts(str(config.data.train), config.data, load_tokenizer(folder), max_prompt_tokens=limit)
    ids = [torch.tensor(prompt.token_ids).numpy() for prompt in prompts[:num_prompts] if len(prompt.token_ids) > 1]
    sequences = [TrainingSequence(i, torch.ones(len(i) - 1).numpy()) for i in ids]
    if not sequences:
        raise UserError(f"data.train: no prompt of two tokens or more in '{config.data.train}' to calibrate on")
    lengths = [sequence.num_positions for sequence in sequences]
    (plan,) = plan_micro_batches(lengths, num_ranks=1, micro_batch_tokens=config.train.micro_batch_tokens)
    return [pack(sequences, micro_batch, pad_to_multiple=1) for micro_batch in plan]


def _log_probs(policy: Policy, micro_batches: Sequence[MicroBatch]) -> Tensor:
    outputs = forward_log_probs(policy, micro_batches)
    return torch.cat(
        [
            part
            for (values, _), micro_batch in zip(outputs, micro_batches, strict=True)
            for part in unpack(values, micro_batch)
        ]
    )
