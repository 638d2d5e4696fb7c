"""A worker extension that records what each parameter held before vLLM prepared it for its kernels."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.rollout.worker_extension import WeightSyncExtension

FOLDER_VARIABLE = "RECORDED_PARAMETERS"


class RecordingExtension(WeightSyncExtension):
    """Writes them to a file `rank<R>_of_<port>.pt`, R: rank in the plan."""

    def on_filled(self, name: str, values: Tensor) -> None:  # type: ignore[override]
        self.__dict__.setdefault("recorded", {})[name] = values.clone()

    def load_trained_shards(self, request: str) -> dict[str, Any]:
        answer = super().load_trained_shards(request)
        folder = Path(os.environ[FOLDER_VARIABLE])
        torch.save(self.__dict__.pop("recorded", {}), folder / f"rank{answer['rank']}.pt")
        return answer
