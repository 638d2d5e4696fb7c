"""What a vLLM worker of a server of its own can be asked to do, over vLLM's `/collective_rpc`.

vLLM adds the class to its worker (`--worker-extension-cls`). A request brings only strings, answers are JSON.
"""

import functools
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rl.rollout.shard_loading import load_shards
from megatron_rl.weights.exchange import Exchange, Loader, Orders, TransferError, verified
from megatron_rl.weights.folder import FolderTransport

_mapped: dict[str, Tensor] = {}
"""The worker's memory of messages, kept between synchronisations."""


class WeightDoors:
    """Methods of the worker."""

    def load_trained_shards(self, request: str) -> dict[str, Any]:
        """Load one version from the trainers; the scheduler is paused.

        Args:
            request: JSON of `rollout.remote`: version, verify, timeout_seconds, folder of the messages, and first_rank
                of this engine in the plan, whose orders lie beside that folder.

        Returns:
            {"rank"} if it is loaded, else {"rank", "error"}: the engine has no usable weights then.
        """
        told = json.loads(request)
        rank = told["first_rank"] + self.rank  # type: ignore[attr-defined]
        transport = FolderTransport(Path(told["folder"]), rank, timeout_seconds=told["timeout_seconds"], mapped=_mapped)
        orders = _orders(told["orders"].format(rank=rank))

        def feed(loader: Loader) -> None:
            check = verified(told["verify"], told["version"])
            Exchange(orders, transport).run({}, loader, version=told["version"], verify=check)

        try:
            load_shards(self, orders.shard, feed)
        except TransferError as error:
            transport.fail(f"rank {rank}: {error}")
            return {"rank": rank, "error": str(error)}
        return {"rank": rank}


@functools.lru_cache(maxsize=1)
def _orders(file: str) -> Orders:
    return Orders.from_json(Path(file).read_text())
