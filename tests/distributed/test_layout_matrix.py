"""Loss, metrics and every gradient tensor at every factorisation of 1, 2 and 4 ranks, against transformers alone.

One world per number of ranks visits many layouts in turn.
"""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.distributed.layout_matrix import LOSSES, RELATIVE, all_cases, differences, reference, some_cases, visit
from tests.distributed.spawn import run_ranks

# 4 layers are what 4 pipeline stages need, or 2 of 2 chunks each. Small beside the family's own, for time.
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4)
FAMILIES = {"qwen3": 0, "qwen3_untied": 0, "qwen3_moe": 4, "deepseek_v3": 8}
"""Family -> number of experts."""
# DeepSeek multiplies what its experts give by 2.5, and with it the roundings: on one rank 2.7e-5 was measured, of
# float32 against float64.
BOUNDS = {"deepseek_v3": 5e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(name, checkpoint, file of the references)."""
    root = tmp_path_factory.mktemp(request.param)
    folder = make_checkpoint(root / "hf", request.param, seed=3, **SMALL)
    torch.save({loss: reference(folder, loss) for loss in LOSSES}, root / "expected.pt")
    return request.param, folder, root / "expected.pt"


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_some_of_everything(family: tuple[str, Path, Path], num_ranks: int) -> None:
    name, folder, expected = family
    cases = some_cases(num_ranks, experts=FAMILIES[name])
    if num_ranks == 4:
        cases = cases[:: {"qwen3": 2, "qwen3_moe": 6}.get(name, 9)]  # for time; all of them in `test_everything`
    for wrong in run_ranks(visit, num_ranks, folder, cases, expected, BOUNDS.get(name, RELATIVE), timeout_s=400.0):
        assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_everything(family: tuple[str, Path, Path], num_ranks: int) -> None:
    name, folder, expected = family
    cases = all_cases(num_ranks, experts=FAMILIES[name])
    for wrong in run_ranks(visit, num_ranks, folder, cases, expected, BOUNDS.get(name, RELATIVE), timeout_s=3000.0):
        assert wrong == []


def test_what_is_wrong_is_seen(family: tuple[str, Path, Path]) -> None:
    """A metric, a gradient's scale or one element that is off, or a tensor that is not there."""
    _, _, expected = family
    metrics, gradients = torch.load(expected, weights_only=True)["grpo"]
    assert not list(differences(metrics, gradients, metrics, gradients))
    name = next(name for name in gradients if name.endswith("q_proj.weight"))
    element = gradients[name].clone()
    element.view(-1)[5] += 2 * RELATIVE * element.norm()
    for planted_metrics, planted in [
        (metrics | {"policy/loss": metrics["policy/loss"] * 1.0001}, gradients),
        (metrics, gradients | {name: gradients[name] * 1.0001}),
        (metrics, gradients | {name: element}),
        (metrics, {other: gradient for other, gradient in gradients.items() if other != name}),
    ]:
        assert len(list(differences(planted_metrics, planted, metrics, gradients))) == 1
