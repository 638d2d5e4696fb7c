"""Tiny Hugging Face checkpoints with random weights: real architectures, real files, a real tokenizer.

`FAMILIES` names what a conversion or an engine can get wrong: tied and untied output weights, biases, q/k norms,
grouped key-value heads, scaled rope, a head size that is not hidden / heads, a vocabulary that no rank count divides.
Every parameter is drawn at random, also norms and biases, which a fresh model leaves at 1 and 0, where swapping two of
them would go unseen.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # one token per byte: 259 = 7 * 37, odd on purpose
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": PAD_TOKEN_ID,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "tie_word_embeddings": False}
# The one shape of latents that vLLM's CPU build computes.
_LATENTS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "scoring_func": "sigmoid",  # two fields of the released checkpoints that transformers leaves out and vLLM needs
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **_EXPERTS,
        **_LATENTS,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "greedy",
        "n_group": 1,  # as released; vLLM's router on a CPU wants both
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_EXPERTS,
        **_LATENTS,
        **_DEEPSEEK_V3,
        "q_lora_rank": 48,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,  # as released; vLLM computes with that whatever the config says
        "intermediate_size": 256,  # halves of 224 channels have no kernel in vLLM's CPU build
        "sliding_window": 8,
        "tie_word_embeddings": False,
        "rope_parameters": {**_YARN, "truncate": False},
    },
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 8},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "moonlight": {**_EXPERTS, **_LATENTS, **_DEEPSEEK_V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "nemotron": {
        "model_type": "nemotron",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "hidden_size": 96, "head_dim": 32},
    "qwen3_untied": {"model_type": "qwen3", "tie_word_embeddings": False, "hidden_size": 96, "head_dim": 32},
    "qwen3_moe": {**_EXPERTS, "model_type": "qwen3_moe", "num_experts": 4, "head_dim": 32, "norm_topk_prob": True},
}


PLAIN = ("llama", "qwen2", "qwen2_tied", "qwen3", "qwen3_untied")
"""Decoders without experts, latent attention or windows, which every layout takes."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every text round-trips, token of byte b is one id in [3, 259)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, chat_template=CHAT_TEMPLATE
    )


def make_checkpoint(folder: Path | str, family: str, seed: int, **overrides: Any) -> Path:
    """Writes config.json, model.safetensors (float32) and the tokenizer to `folder`, and returns it.

    Args:
        folder: created where missing.
        family: a name of `FAMILIES`.
        seed: of the weights; equal seeds give equal files.
        overrides: fields of the Hugging Face config.
    """
    fields = {**_SHAPE, **FAMILIES[family], **overrides}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):  # building a model draws from the global generator
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model, seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Path(folder)


def make_classifier(folder: Path | str, family: str, seed: int, *, per_token: bool = False) -> Path:
    """As `make_checkpoint`, of a model with one score: per sequence, or with a bias per token."""
    fields = {**_SHAPE, **FAMILIES[family], "num_labels": 1}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        model = kind.from_config(config, dtype=torch.float32)
    draw_weights(model, seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Redraws every parameter in place; logits come out with a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    stacks_are_transposed = model.config.model_type == "gpt_oss"
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, parameter in (*model.named_parameters(), *buffers):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(1.0 + 0.1 * noise)
        else:
            fan_in = parameter.shape[1 if stacks_are_transposed and parameter.dim() == 3 else -1]
            # Norms keep activations at about 1 per element and fan_in^-1/2 keeps the products there. Twice that spreads
            # the logits, and lets layers outweigh the embedding, which in a tied model only predicts the last token.
            parameter.copy_(2.0 * fan_in**-0.5 * noise)
