"""Loss, metrics and every gradient tensor at every factorisation of 1, 2 and 4 ranks, against transformers alone.

One world per number of ranks visits many layouts in turn.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import FAMILIES, make_checkpoint
from tests.distributed.layout_matrix import (
    RELATIVE,
    Case,
    all_cases,
    differences,
    references,
    some_cases,
    visit,
)
from tests.distributed.spawn import run_ranks

# 4 layers are what 4 pipeline stages need, or 2 of 2 chunks each. Small beside the family's own, for time.
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4)
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_untied": {},
    "qwen3_moe": {"experts": 4},
    "deepseek_v3": {"experts": 8},
    "gpt_oss": {"experts": 4, "whole_experts": True},
}
"""One family of each kind -> what `layouts` asks of its experts. These meet everything with everything."""
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"experts": 8},
    "llama": {},
    "mistral": {},
    "mixtral": {"experts": 4},
    "moonlight": {"experts": 8},
    "nemotron": {},
    "qwen2": {},
    "qwen2_tied": {},
}
"""The other families, likewise. These meet each layout once."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@cache
def prepared(root: Path, family: str) -> tuple[Path, Path]:
    """(checkpoint, file of the references)."""
    folder = make_checkpoint(root / family, family, seed=3, **SMALL)
    expected = root / f"{family}.pt"
    torch.save(references(folder), expected)
    return folder, expected


def check(root: Path, family: str, num_ranks: int, cases: list[Case], timeout_s: float) -> None:
    folder, expected = prepared(root, family)
    for wrong in run_ranks(visit, num_ranks, folder, cases, expected, timeout_s=timeout_s):
        assert wrong == []


@pytest.mark.parametrize(
    ("family", "num_ranks", "every"),
    [
        ("qwen3", 1, 1),
        ("qwen3", 2, 1),
        ("qwen3", 4, 3),
        pytest.param("qwen3_untied", 2, 3, marks=pytest.mark.slow),
        ("qwen3_moe", 2, 1),
        pytest.param("qwen3_moe", 4, 9, marks=pytest.mark.slow),
        ("deepseek_v3", 2, 3),
        ("gpt_oss", 2, 3),
        ("mixtral", 1, 1),
        ("mixtral", 2, 3),
        *(pytest.param(family, 2, 1, marks=pytest.mark.slow) for family in OTHERS),
        *(pytest.param(family, 4, 3, marks=pytest.mark.slow) for family in OTHERS),
    ],
)
def test_some_of_everything(root: Path, family: str, num_ranks: int, every: int) -> None:
    """Each layout, or every so manieth, with another loss and size of micro-batches."""
    check(root, family, num_ranks, some_cases(num_ranks, **(KINDS | OTHERS)[family])[::every], 300.0)


@pytest.mark.slow
@pytest.mark.timeout(3100)
@pytest.mark.parametrize(
    ("num_ranks", "stages", "tensor"),
    [(ranks, pp, tp) for ranks in (1, 2, 4) for pp in (1, 2, 4) for tp in (1, 2, 4) if ranks % (pp * tp) == 0],
)
@pytest.mark.parametrize("family", KINDS)
def test_everything(root: Path, family: str, num_ranks: int, stages: int, tensor: int) -> None:
    """Each layout, way of sending tokens to experts, loss and size of micro-batches; in pieces, for a busy machine."""
    piece = dict(pipeline_model_parallel_size=stages, tensor_model_parallel_size=tensor)
    cases = [c for c in all_cases(num_ranks, **KINDS[family]) if c.layout.items() >= piece.items()]
    assert cases
    check(root, family, num_ranks, cases, 3000.0)


def test_every_family_is_met() -> None:
    assert set(KINDS | OTHERS) == set(FAMILIES)


def test_what_is_wrong_is_seen(root: Path) -> None:
    """A metric, a gradient's scale or one element that is off, or a tensor that is not there."""
    _, expected = prepared(root, "qwen3")
    of_losses, bound = torch.load(expected, weights_only=True)
    metrics, gradients = of_losses["grpo"]
    assert bound == RELATIVE  # no rounding of a dense model comes near it
    assert not list(differences(metrics, gradients, metrics, gradients, bound))
    name = next(name for name in gradients if name.endswith("q_proj.weight"))
    element = gradients[name].clone()
    element.view(-1)[5] += 2 * RELATIVE * element.norm()
    for planted_metrics, planted in [
        (metrics | {"policy/loss": metrics["policy/loss"] * 1.0001}, gradients),
        (metrics, gradients | {name: gradients[name] * 1.0001}),
        (metrics, gradients | {name: element}),
        (metrics, {other: gradient for other, gradient in gradients.items() if other != name}),
    ]:
        assert len(list(differences(planted_metrics, planted, metrics, gradients, bound))) == 1
