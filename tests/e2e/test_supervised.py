"""Supervised training that looks at whole distributions: smoothed labels, and the exact divergence from a teacher."""

import json
from pathlib import Path

from tests.e2e.runs import Run

ROWS = [{"prompt": f"{i}+{i}=", "response": str(2 * i)} for i in range(12)]


def test_smoothed_labels_and_a_teacher(tmp_path: Path) -> None:
    """On two tensor-parallel ranks: the loss falls, and so does the divergence from a teacher of other weights."""
    run = Run(
        tmp_path,
        data={"train": "rows.jsonl", "eval": None},
        optimizer={"lr": 3e-3, "lr_warmup_steps": 0},
        train={"num_steps": 8, "global_batch_size": 12},
        checkpoint={"save_interval": 0},
        evaluation={"interval": 0},
        algorithm={
            "supervised": {"loss": "label_smoothed", "args": {"smoothing": 0.1}},
            "kl": {"coefficient": 2.0, "reference_path": "teacher", "estimator": "exact", "direction": "forward"},
        },
    )
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"recipe": "sft"}))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run.write_teacher()
    rows = run.train_forked().rows
    assert len(rows) == 8
    assert rows[0]["policy/kl_ref"] > 0.01
    assert rows[-1]["policy/kl_ref"] < 0.9 * rows[0]["policy/kl_ref"]
    assert rows[-1]["sft/loss"] < rows[0]["sft/loss"]
    # The loss is that of the labels, whose least is the entropy of the smoothed target, and twice the divergence.
    assert all(row["sft/loss"] - 2 * row["policy/kl_ref"] > 0.3 for row in rows)
