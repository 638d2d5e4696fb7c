"""Whether a Megatron model and a Hugging Face checkpoint are the same function: log-probs of a few prompts."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.device import this_device
from megatron_rl.models.scalar_head import is_per_token, is_scalar

_NUM_PROMPTS, _NUM_TOKENS = 4, 32


def check_verifiable(hf: dict[str, Any]) -> None:
    """Raise UserError if transformers cannot load the checkpoint of a config.json here."""
    method = (hf.get("quantization_config") or {}).get("quant_method")
    if method == "fp8" and importlib.util.find_spec("accelerate") is None:
        raise UserError("--verify: transformers reads FP8 only beside the package accelerate, which is not installed")


@torch.no_grad()
def largest_difference(gpt: Any, folder: Path, hf: dict[str, Any]) -> float:
    """The largest difference of a token's log-prob, or of a classifier's score, between Megatron and transformers.

    Both compute in the dtype of their weights: in float32 they agree to about 1e-5, in bfloat16 to about 1e-1.

    Args:
        gpt: whole GPTModel on one rank.
        folder: of the Hugging Face checkpoint; its model is loaded beside, which takes its memory once more.
        hf: its config.json; the prompts are token ids below its vocab_size, drawn from a fixed seed.

    Returns:
        Nats, or what a score counts. Prompts of 32 tokens; four of them.
    """
    vocab_size = hf["vocab_size"]
    ids = torch.randint(vocab_size, (_NUM_PROMPTS, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(this_device())
    was_training = gpt.training
    gpt.eval()
    positions = torch.arange(_NUM_TOKENS, device=ids.device).expand_as(ids)
    ours = gpt(ids, positions, None)
    gpt.train(was_training)
    theirs = _load(folder, hf, next(gpt.parameters()).dtype).to(ids.device).eval()
    if is_scalar(hf):
        hidden = theirs.model(ids).last_hidden_state
        return float((ours.float() - theirs.score(hidden).float()).abs().max())
    return float((_log_probs(ours[..., :vocab_size], ids) - _log_probs(theirs(ids).logits, ids)).abs().max())


def _load(folder: Path, hf: dict[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model; what is quantised in its files is unpacked, as it is here."""
    import transformers

    quantized = (hf.get("quantization_config") or {}).get("quant_method")
    unpacking = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}
    settings = {"quantization_config": unpacking[quantized](dequantize=True)} if quantized in unpacking else {}
    kind: Any = transformers.AutoModelForCausalLM
    if is_scalar(hf):
        per_token = is_per_token(hf)
        kind = (
            transformers.AutoModelForTokenClassification
            if per_token
            else (transformers.AutoModelForSequenceClassification)
        )
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **settings)
    for parameter in model.parameters():  # what transformers unpacks is bfloat16, whatever it was asked for
        parameter.data = parameter.data.to(dtype)
    return model


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, L, V], [B, L] -> [B, L - 1] float32: of every token but the first."""
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
