"""A vLLM server gives a reward model's scores as transformers does, and a run the same rewards as its ranks do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from megatron_rl.rollout.server import RewardServer
from tests.checkpoints import make_classifier
from tests.e2e.test_algorithms import run_of

SEQUENCES = [[5, 17, 201, 33, 8], [9, 41], [250, 3, 77, 77, 12, 64, 31]]
ARGUMENTS = ["--dtype", "float32", "--max-model-len", "32", "--enforce-eager", "--kv-cache-memory-bytes", "50000000"]
# float32 sums in another order: scores of about 1 after two layers.
TOLERANCE = 2e-5


@pytest.mark.parametrize("per_token", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scores_are_those_of_transformers(per_token: bool, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "model", "qwen3", 4, per_token=per_token)
    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    server = RewardServer(str(folder), ARGUMENTS, per_token=per_token, log=tmp_path / "log")
    try:
        found = server.scores(SEQUENCES)
    finally:
        server.shutdown()
    for ids, scores in zip(SEQUENCES, found, strict=True):
        with torch.no_grad():
            expected = model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0].numpy()
        np.testing.assert_allclose(scores, expected if per_token else expected[-1:], atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_a_run_gets_the_same_rewards_from_either_engine(kind: str, tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "reward", "qwen3", 4, per_token=kind == "process")
    rows = {}
    for engine in ("megatron", "vllm"):
        model = {"hf_path": str(folder), "kind": kind, "engine": engine, "scale": "probability", "step_separator": ""}
        functions = [{"name": "exact_match", "weight": 0.0}]
        run = run_of(tmp_path / engine, "rloo", rewards={"functions": functions, "model": model}).succeed()
        rows[engine] = run.rows[-2:]
    for ours, served in zip(rows["megatron"], rows["vllm"], strict=True):
        assert ours["reward/std"] > 0
        for name in ("reward/mean", "reward/std", "reward/min", "reward/max", "reward/model", "policy/loss"):
            # Rewards from the two libraries' float32; the second step's samples are those of the first's update.
            assert served[name] == pytest.approx(ours[name], abs=1e-4), name
