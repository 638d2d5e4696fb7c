"""What experts need beside the micro-batches: routes that are kept from one pass to another, and the scale of auxiliary
losses.

A router's choice is not continuous: a weight that moved by one rounding can send a token to another expert, and its
log-prob jumps though the policy hardly changed. So choices that were made before can be taken again by the passes that
train on the same micro-batches (routing replay): those of the pass that computed the old log-probs (Zheng et al. 2025,
arXiv:2507.18071, section 5.3), or those that the engine made when it sampled (Ma et al. 2025, arXiv:2510.11370). Only
which experts are chosen is kept; their weights are computed anew, with gradient.

Load-balancing losses are added by core inside the layers. Core counts on dividing all gradients by the number of
tokens, and multiplies these losses by a rank's tokens beforehand. Here losses come divided, so the scale that makes
them the mean over the micro-batches of a step, each weighted by its tokens, is

    (ranks that share a micro-batch's tokens) / (tokens of all micro-batches of all replicas):

a rank has the part of its own tokens in the loss of a micro-batch, multiplied by their number.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.data.packing import MicroBatch
from megatron_rl.engine.micro_batch_part import MicroBatchPart
from megatron_rl.parallel.groups import Groups, reduce_counts


class RoutingReplay:
    """The routes of the micro-batches of a step, on this rank, for its layers and its tokens."""

    def __init__(self, models: list[GPTModel], groups: Groups) -> None:
        """`models`: this rank's chunks; without routers that can replay, nothing is ever recorded."""
        routers = [[m for m in gpt.modules() if getattr(m, "router_replay", None)] for gpt in models]
        self._routers: list[list[Any]] = [[m.router_replay for m in of_chunk] for of_chunk in routers]
        config, self._groups = models[0].config, groups
        self._sequence_parallel = bool(config.sequence_parallel)
        self._layers = [[_layers_with_experts(config, m.layer_number - 1) for m in of_chunk] for of_chunk in routers]
        self._routes: dict[tuple[int, int], list[Tensor]] = {}
        self._given: dict[int, Tensor] = {}
        self._mode: Literal["record", "replay"] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Passes inside the context keep their micro-batches' routes; earlier ones are forgotten."""
        self._routes, self._given = {}, {}
        yield from self._in_mode("record")

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Passes inside the context send the recorded micro-batches where they went; micro-batches without a record go
        their own way."""
        yield from self._in_mode("replay")

    def take(self, micro_batches: Sequence[MicroBatch], routes: Sequence[NDArray[np.integer[Any]]]) -> None:
        """Record what an engine chose; earlier records are forgotten.

        Args:
            micro_batches: this data-parallel rank's.
            routes: by the number of the sequence, as micro-batches' `sequence_ids` count: [its tokens, layers of the
                whole model that have experts, topk].
        """
        self._routes = {}
        self._given = {id(micro_batch): _of_micro_batch(micro_batch, routes) for micro_batch in micro_batches}

    def _in_mode(self, mode: Literal["record", "replay"]) -> Iterator[None]:
        self._mode = mode
        try:
            yield
        finally:
            self._mode = None

    def before(self, chunk: int, part: MicroBatchPart) -> None:
        """Prepare the routers of a chunk for a pass over a micro-batch."""
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        routes = self._known(chunk, part) if self._mode == "replay" else None
        for number, router in enumerate(self._routers[chunk]):
            router.clear_indices()
            if self._mode == "record":
                router.set_router_replay_action(RouterReplayAction.RECORD)
            elif routes is not None:
                router.target_topk_idx = routes[number].long()
                router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            else:
                router.clear_router_replay_action()

    def _known(self, chunk: int, part: MicroBatchPart) -> list[Tensor] | None:
        """For each router of the chunk [tokens that it sees on this rank, topk]."""
        whole = self._given.get(part.number)
        if whole is None:
            return self._routes.get((chunk, part.number))
        mine = whole if part.slots is None else whole[part.slots.cpu()]
        if self._sequence_parallel:
            mine = mine.chunk(self._groups.tp.size())[self._groups.tp.rank()]
        return [mine[:, layer] for layer in self._layers[chunk]]

    def after(self, chunk: int, part: MicroBatchPart) -> None:
        """Keep what the routers of a chunk chose for a micro-batch, if it is recorded."""
        if self._mode == "record":
            routes = [r.get_recorded_indices().to("cpu", torch.int16) for r in self._routers[chunk]]
            self._routes[chunk, part.number] = routes

    def routes(self) -> list[list[Tensor]]:
        """Recorded: for each chunk and micro-batch, for each of its layers with experts, [tokens of this rank,
        topk]."""
        return list(self._routes.values())


def _layers_with_experts(config: Any, layers: int) -> int:
    """How many of the model's first `layers` layers have experts."""
    every = config.moe_layer_freq
    return sum(every[:layers]) if isinstance(every, list) else len(range(0, layers, every))


def _of_micro_batch(micro_batch: MicroBatch, routes: Sequence[NDArray[np.integer[Any]]]) -> Tensor:
    """[T, layers, topk]; padding goes to the first experts, whatever layers and experts there are."""
    of_sequences = [torch.from_numpy(routes[i].astype(np.int16)) for i in micro_batch.sequence_ids]
    num_real = sum(len(one) for one in of_sequences)
    assert num_real == int(micro_batch.cu_seqlens[len(micro_batch.sequence_ids)]), (
        "one route for each token of a sequence"
    )
    shape = routes[0].shape[1:]
    padding = torch.arange(shape[1], dtype=torch.int16).expand(len(micro_batch.tokens) - num_real, *shape)
    return torch.cat([*of_sequences, padding])


def padding_mask(config: Any, groups: Groups, part: MicroBatchPart, *, first_chunk: bool) -> Tensor | None:
    """[1, tokens] bool: which tokens a model's chunk must not count in balancing; None: all count, or nobody counts.

    The first chunk, with the embedding, takes the mask of all of the part, and splits it with sequence parallelism;
    core has the others take what they see of it.
    """
    counts = config.num_moe_experts and (
        config.moe_router_load_balancing_type != "none" or config.moe_z_loss_coeff or config.moe_router_bias_update_rate
    )
    if part.is_padding is None or not counts:
        return None
    mask = part.is_padding[None]
    if first_chunk or not config.sequence_parallel:
        return mask
    return mask.chunk(groups.tp.size(), dim=1)[groups.tp.rank()]


def scale_auxiliary_losses(config: Any, groups: Groups, num_tokens: int) -> None:
    """Set the scale of the auxiliary losses for the passes that follow: they are sums over a rank's tokens, see
    `models.layers.PackedRouter`, and become means over the global batch; collective over groups.dp.

    Args:
        config: of the model; without experts nothing is done.
        groups: this rank's.
        num_tokens: tokens of all micro-batches of this replica, without padding.
    """
    if not config.num_moe_experts:
        return
    (total,) = reduce_counts([float(num_tokens)], groups.dp)
    scale = 1 / total

    def scaled(value: Tensor) -> Tensor:
        # Core asks for the scale of the auxiliary losses with a constant, and for that of the loss with the loss.
        return value if value.requires_grad else value * scale

    config.grad_scale_func = scaled
