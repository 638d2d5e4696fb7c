"""Real policies into real engines at several layouts, twice with other weights: bit for bit, and as transformers do.

Engines inside the training ranks here; those in processes of their own in `test_weight_sync_apart.py`.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.spawn import run_ranks
from tests.distributed.weight_sync_ranks import (
    SHAPES,
    Checkpoints,
    by_transformers,
    check_outputs,
    differences,
    sync_in_rank,
)

WITH_EXPERTS = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "moonlight", "qwen3_moe")


def check(layout: str, num_ranks: int, engine_sizes: list[int], families: list[str], root: Path) -> None:
    made = [Checkpoints.make(root, family) for family in families]
    folders = {checkpoints.family: [checkpoints.first, *checkpoints.others] for checkpoints in made}
    ranks = run_ranks(sync_in_rank, num_ranks, layout, engine_sizes, folders, timeout_s=300)
    for checkpoints in made:
        for version, folder in enumerate(checkpoints.others, 1):
            expected = by_transformers(folder)
            for size in engine_sizes:
                shards = checkpoints.expected_shards(folder, size)
                for rank, results in enumerate(ranks):
                    result, mine = results[checkpoints.family, size][version - 1], shards[rank % size]
                    assert dict(differences(result["held"], mine)) == {}
                    assert result["metrics"]["sync/bytes"] == 4 * sum(map(real_elements, mine.items()))
                    check_outputs(result, expected, version)


def real_elements(parameter: tuple[str, np.ndarray]) -> int:
    """Elements that are not padding: of a vocabulary, or of a bias that one rank adds for all."""
    name, x = parameter
    padded = ("model.embed", "lm_head")
    return np.count_nonzero(x) if name.startswith(padded) or "w2_bias" in name else x.size


def test_an_engine_of_two_ranks_holds_what_two_pipeline_stages_hold(tmp_path: Path) -> None:
    check("pp2", 2, [2], ["llama_one_group"], tmp_path)


def test_an_engine_of_two_ranks_holds_the_experts_that_two_tensor_parallel_ranks_hold(tmp_path: Path) -> None:
    check("tp2", 2, [2], ["qwen3_moe"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_every_family_at_every_layout(layout: str, family: str, tmp_path: Path) -> None:
    """Into two engines of a rank each, and into one of two ranks."""
    check(layout, 2, [1, 2], [family], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_of_other_ranks(family: str, tmp_path: Path) -> None:
    check("ep2", 2, [1, 2], [family], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_four_ranks(family: str, tmp_path: Path) -> None:
    check("tp2_pp2", 4, [2], [family], tmp_path)


@pytest.mark.slow
def test_experts_and_tensors_of_other_ranks(tmp_path: Path) -> None:
    check("tp2_ep2", 4, [1, 4], ["qwen3_moe"], tmp_path)
    check("tp2_ep2", 4, [1, 2], ["gpt_oss"], tmp_path)  # of two key-value heads
