"""No objective's loss or gradient depends on the layout or on the micro-batches."""

from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint, make_classifier
from tests.distributed.algorithm_ranks import Results, update_of_every_objective
from tests.distributed.spawn import run_ranks
from tests.distributed.training_ranks import LAYOUTS

# Sums over tokens and ranks in another order: float32 rounds at 6e-8, and a norm sums hundreds of terms.
RELATIVE = 2e-5
WHOLE, SMALL = 4096, 24  # micro_batch_tokens: one row for everything, or many rows

Checkpoints = tuple[Path, Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    policy = make_checkpoint(tmp_path_factory.mktemp("policy"), "qwen3", seed=3)
    return policy, make_classifier(tmp_path_factory.mktemp("scalar"), "qwen3", seed=4, per_token=True)


@pytest.fixture(scope="module")
def reference(checkpoints: Checkpoints) -> Results:
    return run_ranks(update_of_every_objective, 1, *checkpoints, "tp1", WHOLE)[0]


@pytest.mark.parametrize(
    "layout",
    [
        "dp2",
        "tp2_pp2",
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("tp1", "tp2_sp", "pp2", "cp2")),
    ],
)
def test_loss_and_gradient_are_equal(checkpoints: Checkpoints, reference: Results, layout: str) -> None:
    for of_rank in run_ranks(update_of_every_objective, LAYOUTS[layout][0], *checkpoints, layout, SMALL):
        assert of_rank.keys() == reference.keys()
        for name, row in of_rank.items():
            assert row == pytest.approx(reference[name], rel=RELATIVE, abs=1e-6, nan_ok=True), name


def test_the_reference_is_worth_comparing_with(reference: Results) -> None:
    """Every objective has a gradient, and no two the same one; bounds are at work, but not everywhere."""
    norms = {name: row["grad_norm"] for name, row in reference.items()}
    assert all(norm > 1e-4 for norm in norms.values()), norms
    assert len(set(norms.values())) == len(norms)
    for name in ("ppo_clip", "gspo", "cispo"):
        assert 0 < reference[name]["policy/clip_fraction"] < 1, name
