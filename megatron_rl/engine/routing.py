"""What experts need beside the rows: routes that are kept from one pass to another, and the scale of auxiliary losses.

A router's choice is not continuous: a weight that moved by one rounding can send a token to another expert, and its
log-prob jumps though the policy hardly changed. So the choices of the pass that computed the old log-probs can be
recorded and taken again by the passes that train on the same rows (routing replay; Zheng et al. 2025,
arXiv:2507.18071, section 5.3). Only which experts are chosen is kept; their weights are computed anew, with gradient.

Load-balancing losses are added by core inside the layers. Core counts on dividing all gradients by the number of
tokens, and multiplies these losses by a rank's tokens beforehand. Here losses come divided, so the scale that makes
them the mean over the rows of a step, each weighted by its tokens, is

    (ranks that share a row's tokens) / (tokens of all rows of all replicas):

a rank has the part of its own tokens in the loss of a row, multiplied by their number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.reductions import reduce_counts


class RoutingReplay:
    """The routes of the rows of a step, on this rank, for its layers and its tokens."""

    def __init__(self, models: list[GPTModel]) -> None:
        """`models`: this rank's chunks; without routers that can replay, nothing is ever recorded."""
        self._routers = [[r for m in gpt.modules() if (r := getattr(m, "router_replay", None))] for gpt in models]
        self._routes: dict[tuple[int, int], list[Tensor]] = {}
        self._mode: Literal["record", "replay"] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Passes inside the context keep their rows' routes; earlier ones are forgotten."""
        self._routes = {}
        yield from self._in_mode("record")

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Passes inside the context send the recorded rows where they went; rows without a record go their own way."""
        yield from self._in_mode("replay")

    def _in_mode(self, mode: Literal["record", "replay"]) -> Iterator[None]:
        self._mode = mode
        try:
            yield
        finally:
            self._mode = None

    def before(self, chunk: int, row: int) -> None:
        """Prepare the routers of a chunk for a pass over a row."""
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        routes = self._routes.get((chunk, row)) if self._mode == "replay" else None
        for number, router in enumerate(self._routers[chunk]):
            router.clear_indices()
            if self._mode == "record":
                router.set_router_replay_action(RouterReplayAction.RECORD)
            elif routes is not None:
                router.target_topk_idx = routes[number].long()
                router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            else:
                router.clear_router_replay_action()

    def after(self, chunk: int, row: int) -> None:
        """Keep what the routers of a chunk chose for a row, if it is recorded."""
        if self._mode == "record":
            self._routes[chunk, row] = [r.get_recorded_indices().to("cpu", torch.int16) for r in self._routers[chunk]]

    def routes(self) -> list[list[Tensor]]:
        """Recorded: for each chunk and row, for each of its layers with experts, [tokens of this rank, topk]."""
        return list(self._routes.values())


def scale_auxiliary_losses(config: Any, groups: Groups, num_tokens: int) -> None:
    """Set the scale of core's load-balancing losses for the passes that follow; collective over groups.dp.

    Args:
        config: of the model; without experts nothing is done.
        groups: this rank's.
        num_tokens: tokens of all rows of this replica.
    """
    if not config.num_moe_experts:
        return
    (total,) = reduce_counts([float(num_tokens)], groups.dp)
    sharing = groups.cp.size() * (groups.tp.size() if config.sequence_parallel else 1)
    scale = sharing / total

    def scaled(value: Tensor) -> Tensor:
        # Core asks for the scale of the auxiliary losses with a constant, and for that of the loss with the loss.
        return value if value.requires_grad else value * scale

    config.grad_scale_func = scaled
