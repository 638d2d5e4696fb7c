"""The mathematics does not depend on the layout: equal losses and gradient norms at every factorisation."""

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks
from tests.distributed.training_ranks import LAYOUTS, train_recorded

# Sums over tokens are made in another order at another layout: float32 rounds at 6e-8, and 5 optimizer steps of Adam
# carry it on. The bound is the contract's.
RELATIVE = 1e-5
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WHOLE, SMALL = 4096, 24  # micro_batch_tokens: one micro-batch for everything, or many micro-batches


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3", seed=3)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> dict[str, list[dict[str, float]]]:
    return run_ranks(train_recorded, 1, checkpoint, "tp1", WHOLE, {})[0]


@pytest.mark.parametrize(
    ("layout", "micro_batch_tokens", "model"),
    [
        ("tp1", SMALL, {}),
        ("tp1", WHOLE, {"recompute_granularity": "selective"}),
        ("tp2", WHOLE, {}),
        ("tp2_sp", SMALL, {}),
        ("tp2_sp", SMALL, FULL_RECOMPUTE),
        ("pp2", SMALL, {}),
        ("dp2", SMALL, {}),
        ("cp2", SMALL, {}),
        ("tp2_pp2", SMALL, {}),
    ],
)
def test_five_steps_are_equal(
    checkpoint: Path,
    reference: dict[str, list[dict[str, float]]],
    layout: str,
    micro_batch_tokens: int,
    model: dict[str, Any],
) -> None:
    for of_rank in run_ranks(train_recorded, LAYOUTS[layout][0], checkpoint, layout, micro_batch_tokens, model):
        for kind, rows in of_rank.items():
            for step, (expected, row) in enumerate(zip(reference[kind], rows, strict=True)):
                assert row == pytest.approx(expected, rel=RELATIVE, abs=1e-7), f"{kind}, step {step}"


def test_the_reference_is_worth_comparing_with(reference: dict[str, list[dict[str, float]]]) -> None:
    """Its losses move and its clipping is at work, so that equality above says something."""
    grpo = reference["grpo"]
    assert len({row["policy/loss"] for row in grpo}) == len(grpo)
    assert 0 < grpo[0]["policy/clip_fraction"] < 1
    sft = [row["sft/loss"] for row in reference["sft"]]
    assert sft[-1] < sft[0]
