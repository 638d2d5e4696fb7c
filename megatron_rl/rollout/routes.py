"""Which experts vLLM's routers chose for the tokens of each request, kept from the forward passes that made them.

Training and engine compute the same router in another order of sums, and where two experts score almost alike they
choose differently; the log-prob of that token then jumps. Taking the engine's choices in training removes the jump
(rollout routing replay; Ma et al. 2025, arXiv:2510.11370). Only the choices travel, not their weights.

vLLM's routers call a function with the choices of each layer, for all tokens of a step side by side. Which request and
which position a token belongs to is known to the model runner around the same forward pass, so that pass is wrapped. A
request that vLLM ends early and computes again brings the same positions again; the last ones count.

The engine must run without a cache of prefixes, whose tokens pass no router, and eagerly: a captured graph calls no
function. Importing this module imports vLLM; see `isolation`.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from megatron_rl.rollout.sampling import RolloutError

Routes = NDArray[np.uint8] | NDArray[np.int16]


class RouteRecorder:
    """The routes of the requests that a worker runs."""

    def __init__(self, worker: Any) -> None:
        """Listen to the routers of vLLM's worker of this rank from now on; to be called through `collective_rpc`.

        Raises:
            RolloutError: the model has no experts, or the kernel of its experts does not report its choices.
        """
        self._runner = worker.model_runner
        self._of_step: dict[int, Tensor] = {}
        self._of_request: dict[str, list[tuple[NDArray[np.int64], Routes]]] = {}
        layers = [module for module in self._runner.model.modules() if isinstance(module, MoERunner)]
        if not layers:
            raise RolloutError("rollout.record_routes: the model has no experts")
        self._dtype = np.uint8 if worker.model_config.get_num_experts() <= 256 else np.int16
        for layer in layers:
            if layer._quant_method.is_monolithic or not isinstance(layer.router, BaseRouter):
                kernel = type(layer._quant_method).__name__
                raise RolloutError(f"rollout.record_routes: experts in vLLM's {kernel} do not report their routes")
            layer.router.set_capture_fn(partial(self._of_step.__setitem__, int(layer.layer_id)))
        self._forward = self._runner._model_forward
        self._runner._model_forward = self._recording_forward

    def _recording_forward(self, *args: Any, **kwargs: Any) -> Any:
        self._of_step.clear()
        output = self._forward(*args, **kwargs)
        batch, positions = self._runner.input_batch, kwargs["positions"].cpu().numpy()
        starts = self._runner.query_start_loc.np
        # [tokens, layers, topk], layers in the model's order.
        chosen = np.stack([self._of_step[layer].cpu().numpy() for layer in sorted(self._of_step)], axis=1)
        chosen = chosen.astype(self._dtype)
        for number, request in enumerate(batch.req_ids):
            tokens = slice(int(starts[number]), int(starts[number + 1]))
            self._of_request.setdefault(_given(request), []).append((positions[tokens].copy(), chosen[tokens]))
        return output

    def take(self, request: str, num_positions: int) -> Routes:
        """[num_positions, layers with experts, topk] of a request that has ended, which is forgotten.

        Raises:
            RuntimeError: a position came through no router.
        """
        parts = self._of_request.pop(request)
        routes = np.zeros((num_positions, *parts[0][1].shape[1:]), dtype=self._dtype)
        seen = np.zeros(num_positions, dtype=bool)
        for positions, chosen in parts:
            inside = positions < num_positions
            routes[positions[inside]] = chosen[inside]
            seen[positions[inside]] = True
        if not seen.all():
            raise RuntimeError(f"request {request}: position {int(seen.argmin())} came through no router of the engine")
        return routes

    def forget(self) -> None:
        """Drop what is left of requests that were aborted or whose routes nobody wants."""
        self._of_request.clear()


def _given(request: str) -> str:
    """The name that a request was added under; vLLM puts random characters behind it."""
    return request.partition("-")[0]
