"""A reward model in a vLLM server: token ids in, scores out.

vLLM serves a *ForSequenceClassification or *ForTokenClassification of one label with its pooling runner. Its weights
stay as they are, so the server needs none of the doors through which a policy's pass.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_rl.rollout.server import EngineServer

_REQUEST_SECONDS = 600.0
_SEQUENCES = 1024
"""Of one request."""


class RewardServer:
    """The server, and this rank's hold on it."""

    def __init__(self, model_path: str, arguments: Sequence[str], *, per_token: bool, log: Path) -> None:
        """Start it and wait until it answers.

        Args:
            model_path: folder of a Hugging Face classifier of one label.
            arguments: of vLLM's server: dtype, longest sequence.
            per_token: a score of every token, of a *ForTokenClassification; else one of the last.
            log: file for its output.

        Raises:
            EngineLost: it did not start; the end of its log is in the message.
        """
        self._task = "token_classify" if per_token else "classify"
        self.server = EngineServer(model_path, ["--runner", "pooling", "--convert", "classify", *arguments], log=log)
        self.server.ready()

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of token ids: the score of the last token, [1], or of every one, [tokens]; float32, as the head gives it.

        Raises:
            EngineLost: the server is dead, or does not answer in time.
        """
        found: list[np.ndarray] = []
        for start in range(0, len(sequences), _SEQUENCES):
            body = {
                "input": [list(map(int, ids)) for ids in sequences[start : start + _SEQUENCES]],
                "task": self._task,
                "use_activation": False,
                "encoding_format": "float",
            }
            answer = self.server.address.post("/pooling", body, timeout_seconds=_REQUEST_SECONDS)
            of_request = sorted(answer["data"], key=lambda item: item["index"])
            found += [np.asarray(item["data"], dtype=np.float32).reshape(-1) for item in of_request]
        return found

    def shutdown(self) -> None:
        """End it."""
        self.server.end()
