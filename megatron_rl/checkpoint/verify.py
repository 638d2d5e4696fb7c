"""Whether a Megatron model and a Hugging Face checkpoint are the same function: log-probs of a few prompts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.device import this_device

_NUM_PROMPTS, _NUM_TOKENS = 4, 32


@torch.no_grad()
def largest_log_prob_difference(gpt: Any, folder: Path, vocab_size: int) -> float:
    """The largest difference of a token's log-prob between Megatron and transformers.

    Both compute in the dtype of their weights: in float32 they agree to about 1e-5, in bfloat16 to about 1e-1.

    Args:
        gpt: whole GPTModel on one rank.
        folder: of the Hugging Face checkpoint; its model is loaded beside, which takes its memory once more.
        vocab_size: of config.json; the prompts are token ids below it, drawn from a fixed seed.

    Returns:
        Nats. Prompts of 32 tokens; four of them.
    """
    from transformers import AutoModelForCausalLM

    ids = torch.randint(vocab_size, (_NUM_PROMPTS, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(this_device())
    was_training = gpt.training
    gpt.eval()
    positions = torch.arange(_NUM_TOKENS, device=ids.device).expand_as(ids)
    ours = _log_probs(gpt(ids, positions, None)[..., :vocab_size], ids)
    gpt.train(was_training)
    dtype = next(gpt.parameters()).dtype
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    theirs = theirs.to(ids.device).eval()
    return float((ours - _log_probs(theirs(ids).logits, ids)).abs().max())


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, L, V], [B, L] -> [B, L - 1] float32: of every token but the first."""
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
