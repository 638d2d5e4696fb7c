"""Any legal model at any legal layout: transformers' log-probs, and an export that is the file that was imported.

A world of ranks visits random models one after another, the same ones at every run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint
from tests.distributed.random_models import RandomModel, different_families
from tests.distributed.spawn import run_ranks
from tests.distributed.test_conversion import TOLERANCE, files, hf_log_probs

PER_WORLD = 4
"""Models of one world. Every layout leaves some 30 process groups behind, whose threads take time from all ranks."""


@dataclass(frozen=True)
class Visited:
    """A model on disk."""

    folder: Path
    parallel: dict[str, object]
    sequences: list[list[int]]


def visit(rank: int, models: list[Visited]) -> list[tuple[list[np.ndarray], np.ndarray | None]]:
    """Import every model at its layout and export it beside itself.

    Returns:
        Of each its log-probs, and on the last pipeline stage the logits of its longest sequence.
    """
    import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
    from megatron_rl.checkpoint.hf_export import export_hf
    from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy
    from tests.distributed.layout_matrix import leave
    from tests.distributed.test_conversion import policy_log_probs

    results = []
    for model in models:
        parallel = ParallelConfig(**model.parallel)  # type: ignore[arg-type]
        groups = initialize(parallel, seed=1)
        policy = Policy(ModelConfig(hf_path=str(model.folder), params_dtype=Dtype.float32), groups, parallel)
        results.append((policy_log_probs(policy, model.sequences), policy_logits(policy, model.sequences[1])))
        export_hf(policy, model.folder.with_name(f"{model.folder.name}_exported"))
        leave(policy)
    return results


def policy_logits(policy: Any, sequence: list[int]) -> np.ndarray | None:
    """[L, vocab_size] on the last pipeline stage, None on the others: the last stage's output layer on its output."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from megatron_rl.data.packing import pack
    from megatron_rl.data.samples import TrainingSequence
    from megatron_rl.engine.step import forward_hidden

    padded = [*sequence, 0]  # a micro-batch holds one token less than its sequences: the last is only a label
    micro_batch = pack(
        [TrainingSequence(np.array(padded), np.ones(len(sequence), dtype=np.float32))], [0], pad_to_multiple=4
    )
    micro_batches = [micro_batch] * (policy.groups.pp.size() if len(policy.chunks) > 1 else 1)
    hidden = forward_hidden(policy, micro_batches)
    if not policy.groups.is_last_stage:
        return None
    gpt, tp, last = policy.models[-1], policy.groups.tp, hidden[-1]
    if policy.config.sequence_parallel:
        last = gather_from_sequence_parallel_region(last)
    weight = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    shard = last @ (gpt.output_layer.weight if weight is None else weight).t()
    shards = [torch.empty_like(shard) for _ in range(tp.size())]
    dist.all_gather(shards, shard.contiguous(), group=tp)
    return torch.cat(shards, dim=-1)[: len(sequence), : policy.hf["vocab_size"]].numpy()


@torch.no_grad()
def hf_logits(folder: Path, sequence: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return np.asarray(model(torch.tensor([sequence])).logits[0])


def check(folder: Path, models: list[RandomModel], num_ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    visited = []
    for number, model in enumerate(models):
        path = make_checkpoint(folder / f"model_{number}", model.family, seed=number, **model.fields)
        vocab_size = model.fields["vocab_size"]
        sequences = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (2, 27, 9)]
        sequences[0][1] = vocab_size - 1  # the last row before the padding
        visited.append(Visited(path, model.parallel, sequences))
    expected = [hf_log_probs(v.folder, v.sequences) for v in visited]
    logits = [hf_logits(v.folder, v.sequences[1]) for v in visited]
    seen: set[int] = set()
    for of_rank in run_ranks(visit, num_ranks, visited, timeout_s=400.0):
        for number, (log_probs, of_last_stage) in enumerate(of_rank):
            model, theirs = models[number], expected[number]
            if of_last_stage is not None:
                np.testing.assert_allclose(of_last_stage, logits[number], rtol=0, atol=TOLERANCE, err_msg=str(model))
                seen.add(number)
            for ours, reference in zip(log_probs, theirs, strict=True):
                np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE, err_msg=str(model))
    assert seen == set(range(len(models)))
    for model, v in zip(models, visited, strict=True):
        assert files(v.folder.with_name(f"{v.folder.name}_exported")) == files(v.folder), model


def examples(num_ranks: int, families: int, count: int) -> list[RandomModel]:
    """`count` times so many families, the same at every run.

    They are drawn first and then visited: to shrink a failing example, which names its model anyway, would start
    worlds of ranks for hours.
    """
    drawn: list[RandomModel] = []

    @settings(derandomize=True, deadline=None, phases=[Phase.generate], database=None, max_examples=count)
    @given(models=different_families(num_ranks, families))
    def draw(models: list[RandomModel]) -> None:
        drawn.extend(models)

    draw()
    return drawn


@pytest.mark.parametrize(
    ("num_ranks", "families", "count"),
    [
        (2, 4, 2),
        pytest.param(2, 8, 3, marks=pytest.mark.slow),
        pytest.param(4, 8, 3, marks=pytest.mark.slow),
    ],
)
def test_any_legal_model(tmp_path: Path, num_ranks: int, families: int, count: int) -> None:
    models = examples(num_ranks, families, count)
    for first in range(0, len(models), PER_WORLD):
        check(tmp_path / str(first), models[first : first + PER_WORLD], num_ranks)
