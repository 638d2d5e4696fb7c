"""A checkpoint of somebody else's Megatron training run becomes a Hugging Face one: the same logits.

Core's own model, layers, optimizer and checkpoint format, none of ours; the logits of that model are compared with
those of transformers' on what was converted.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.checkpoint.convert import megatron_to_hf
from tests.checkpoints import make_checkpoint
from tests.distributed import other_trainer
from tests.distributed.other_trainer import PROMPT
from tests.distributed.spawn import run_ranks

# float32 on both sides, logits of about 1 to 10 after three steps; a tensor in the wrong place moves them by over 0.1.
TOLERANCE = 1e-4
TP2 = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 1}
EP2 = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("family", "sizes", "metadata"),
    [
        ("qwen3_untied", TP2, {}),
        # Layers are stacked in the tensors of the checkpoint, or each has tensors of its own.
        ("qwen3_moe", EP2, {}),
        pytest.param("qwen3_moe", EP2, {"non_homogeneous_layers": True}, marks=pytest.mark.slow),
        pytest.param("qwen3_untied", TP2, {"non_homogeneous_layers": True}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", EP2, {"singleton_local_shards": True}, marks=pytest.mark.slow),
        pytest.param("qwen3_untied", TP2, {"singleton_local_shards": True}, marks=pytest.mark.slow),
    ],
)
def test_it_is_converted(tmp_path: Path, family: str, sizes: dict[str, int], metadata: dict[str, Any]) -> None:
    of_ranks = run_ranks(other_trainer.run, 2, tmp_path / "run", sizes, family == "qwen3_moe", metadata)
    hf_path = make_checkpoint(tmp_path / "hf", family, seed=3, hidden_size=96)
    difference = megatron_to_hf(
        checkpoint=tmp_path / "run", hf_path=hf_path, output=tmp_path / "converted", verify=True
    )
    assert difference is not None
    assert difference < TOLERANCE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(PROMPT)[None]).logits[0]
    for theirs in of_ranks:
        torch.testing.assert_close(logits, theirs, rtol=0, atol=TOLERANCE)
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["vocab_size"] == logits.shape[1]
