"""A model with a scalar head computes what transformers' classifiers compute, at every layout, and writes them back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.checkpoints import make_checkpoint, make_classifier
from tests.distributed.scalar_ranks import export_scalar, values_of
from tests.distributed.spawn import run_ranks
from tests.distributed.training_ranks import LAYOUTS

SEQUENCES = [[5, 17, 201, 33, 8], [9, 41], [250, 3, 77, 77, 12, 64, 31]]
# float32 sums in another order: logits of about 2 after two layers.
TOLERANCE = 2e-5


@pytest.mark.parametrize(
    ("family", "per_token", "layout"),
    [
        ("qwen2", False, "tp2_pp2"),
        pytest.param("qwen3", False, "tp2_sp", marks=pytest.mark.slow),
        pytest.param("llama", True, "tp2", marks=pytest.mark.slow),
        pytest.param("qwen3_untied", True, "pp2", marks=pytest.mark.slow),
    ],
)
def test_values_are_those_of_transformers(family: str, per_token: bool, layout: str, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path, family, 4, per_token=per_token)
    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for ids in SEQUENCES:
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state
            expected.append(model.score(hidden)[0, :, 0].numpy())
    for of_rank in run_ranks(values_of, LAYOUTS[layout][0], folder, layout, per_token, SEQUENCES):
        for ours, theirs in zip(of_rank, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize(("per_token", "layout"), [pytest.param(False, "tp2", marks=pytest.mark.slow), (True, "pp2")])
def test_round_trip_is_exact(per_token: bool, layout: str, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "in", "qwen3", 5, per_token=per_token)
    run_ranks(export_scalar, 2, folder, layout, per_token, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    assert kind.from_pretrained(tmp_path / "out").num_labels == 1


# Tied, and with an output layer that is left out.
@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_language_model_starts_with_values_of_zero(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family, 6)
    for values in run_ranks(values_of, 1, folder, "tp1", False, SEQUENCES)[0]:
        assert np.array_equal(values, np.zeros_like(values))
