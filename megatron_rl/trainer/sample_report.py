"""What is said about the samples of a step: metrics, and a few of them in full."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.data.samples import Sample


def sample_metrics(samples: Sequence[Sample], *, version: int) -> dict[str, float]:
    """Metrics reward/*, response/*, staleness/* and throughput/tokens.

    Args:
        version: of the weights that the samples train.
    """
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    lengths = torch.tensor([len(sample.completion.token_ids) for sample in samples], dtype=torch.float64)
    truncated = [sample.completion.finish_reason == "length" for sample in samples]
    ages = [version - sample.completion.weight_version for sample in samples]
    num_lost = sum(len(sample.lost) for sample in samples)
    terms = {
        f"reward/{name}": sum(sample.reward_terms[name] for sample in samples) / len(samples)
        for name in samples[0].reward_terms
    }
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        **terms,
        **({"reward/lost": float(num_lost)} if num_lost else {}),
        "response/length_mean": float(lengths.mean()),
        "response/truncated_fraction": sum(truncated) / len(truncated),
        "staleness/mean": sum(ages) / len(ages),
        "staleness/max": max(ages),
        "throughput/tokens": float(lengths.sum()) + sum(len(sample.prompt.token_ids) for sample in samples),
    }


def sample_records(samples: Sequence[Sample], advantages: Tensor, *, step: int, count: int) -> list[dict[str, Any]]:
    """`count` of the samples, evenly spaced, as `rollout_log` writes them.

    Args:
        advantages: [samples].
        step: that made them.
    """
    every = max(1, len(samples) // max(1, count))
    return [_record(samples[i], float(advantages[i]), step) for i in range(0, len(samples), every)[:count]]


def _record(sample: Sample, advantage: float, step: int) -> dict[str, Any]:
    prompt, completion = sample.prompt, sample.completion
    return {
        "step": step,
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "prompt": prompt.text,
        "completion": completion.text,
        "answer": prompt.answer,
        "reward": sample.reward,
        "reward_terms": sample.reward_terms,
        "advantage": advantage,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "weight_version": completion.weight_version,
    }
