"""The optimizer's state as tensors of the model: what one layout saved, any other loads, bit for bit.

Core's optimizer steps flat pieces: with the distributed optimizer a data-parallel rank owns a range of each bucket,
which begins and ends anywhere inside a parameter. On disk, a moment has the name, shape and sharding of its parameter
(`optimizer.exp_avg.decoder.layers...`), so the checkpoint knows nothing of tensor, pipeline, expert or data ranks.

    saving    every parameter is given to one rank of its data-parallel group, which collects its pieces and writes it;
              so all replicas write, and none holds more than its share
    loading   every rank reads the parameters that its pieces lie in, whole, and cuts its pieces out

Besides the moments, a parameter in bfloat16 has its float32 copy (`main`); one in float32 is its own. The count of
steps is one number: every update steps every parameter. Rates, decays and the schedule are the configuration's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from megatron_rl.engine.optimizer import Optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ENTRY_TYPES = (ShardedTensor, ShardedTensorFactory)
_Entry = Any
"""Core's description of a parameter: one of these."""


@dataclass(frozen=True)
class _Piece:
    """The part of a parameter that this rank's optimizer steps."""

    parameter: Tensor
    """The model's."""
    main: Tensor
    """What is stepped: float32; flat with the distributed optimizer."""
    start: int
    """Where it begins in the flattened parameter."""
    state: dict[str, Tensor]

    def tensor(self, kind: str) -> Tensor:
        """[elements] of one kind, flat."""
        return (self.main.detach() if kind == "main" else self.state[kind]).view(-1)


def tensors_to_save(optimizer: Optimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """This rank's share of the state, with `step`. Collective over each data-parallel group.

    Args:
        optimizer: its moments are allocated if it has never stepped.
        model_state: core's sharded state of the model, whose entries hold the parameters themselves.
    """
    entries = _entries(model_state)
    tensors: dict[str, Any] = {}
    for one in _parts(optimizer):
        _allocate_moments(one)
        for number, kind, whole in _whole_tensors(one, entries):
            entry = entries[number]
            sharded = _of_kind(entry, kind, whole.view(entry.data.shape))
            # The ranks of a replica's other coordinates (tensor-parallel copies of a norm) still write it once.
            if _is_sharded(one):
                sharded = replace(sharded, replica_id=(*entry.replica_id[:-1], 0))
            tensors[f"{number}.{kind}"] = sharded
    return {"step": _steps(optimizer), "tensors": tensors}


def tensors_to_load(optimizer: Optimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """Empty tensors for all that this rank needs, whole parameters; `restore` takes them filled."""
    entries = _entries(model_state)
    tensors: dict[str, Any] = {}
    for one in _parts(optimizer):
        _allocate_moments(one)
        for number, piece in _numbered(one, entries):
            for kind in _kinds(piece.parameter):
                # Zeros: rows that pad the vocabulary of this layout and not of the other have no moments.
                whole = torch.zeros(piece.parameter.shape, dtype=piece.tensor(kind).dtype)
                tensors[f"{number}.{kind}"] = _of_kind(entries[number], kind, whole)
    return {"tensors": tensors}


@torch.no_grad()
def restore(optimizer: Optimizer, model_state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Put loaded state (`tensors_to_load`, with `step`) into the optimizer."""
    entries = _entries(model_state)
    for one in _parts(optimizer):
        for number, piece in _numbered(one, entries):
            for kind in _kinds(piece.parameter):
                own = piece.tensor(kind)
                whole = loaded["tensors"][f"{number}.{kind}"].view(-1)
                own.copy_(whole[piece.start : piece.start + own.numel()])
        _set_steps(one, loaded["step"])


def _parts(optimizer: Optimizer) -> list[Any]:
    """Core's optimizers inside; dense and expert parameters have one each."""
    chained = getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron])
    return [one for one in chained if not getattr(one, "is_stub_optimizer", False)]


def _is_sharded(one: Any) -> bool:
    """Whether the data-parallel ranks have a part of the state each."""
    return hasattr(one, "gbuf_ranges")


def _pieces(one: Any) -> Iterator[_Piece]:
    lists: tuple[tuple[Any, Any], ...]
    if _is_sharded(one):
        # Core keeps parameters and what stands for them in parallel lists, by dtype.
        lists = (
            (one.model_fp32_groups, one.shard_fp32_groups),
            (one.model_float16_groups, one.shard_fp32_from_float16_groups),
        )
    elif hasattr(one, "fp32_from_float16_groups"):
        lists = (
            (one.fp32_from_fp32_groups, one.fp32_from_fp32_groups),
            (one.float16_groups, one.fp32_from_float16_groups),
        )
    else:
        groups = [group["params"] for group in one.optimizer.param_groups]
        lists = ((groups, groups),)
    for parameters, mains in lists:
        for of_group in zip(parameters, mains, strict=True):
            for parameter, main in zip(*of_group, strict=True):
                start = one._get_model_param_range_map(parameter)["param"].start if _is_sharded(one) else 0
                yield _Piece(parameter, main, start, one.optimizer.state[main])


def _kinds(parameter: Tensor) -> tuple[str, ...]:
    return _MOMENTS if parameter.dtype is torch.float32 else ("main", *_MOMENTS)


def _entries(model_state: dict[str, Any]) -> list[_Entry]:
    """The model's parameters in core's order, which the ranks of a data-parallel group share."""
    return [entry for entry in nested_values(model_state) if isinstance(entry, _ENTRY_TYPES) and entry.data is not None]


def _numbered(one: Any, entries: list[_Entry]) -> list[tuple[int, _Piece]]:
    """This rank's pieces by the number of their parameter's entry, in order."""
    numbers = {id(entry.data): number for number, entry in enumerate(entries)}
    return sorted(((numbers[id(piece.parameter)], piece) for piece in _pieces(one)), key=lambda pair: pair[0])


def _of_kind(entry: _Entry, kind: str, data: Tensor) -> _Entry:
    return make_sharded_optimizer_tensor(entry, data, prefix=f"optimizer.{kind}")


def _whole_tensors(one: Any, entries: list[_Entry]) -> Iterator[tuple[int, str, Tensor]]:
    """(number of the entry, kind, whole flat tensor) of what this rank writes."""
    pieces = _numbered(one, entries)
    group = one.data_parallel_group if _is_sharded(one) else None
    if group is None or group.size() == 1:
        for number, piece in pieces:
            for kind in _kinds(piece.parameter):
                yield number, kind, piece.tensor(kind)
        return
    held: list[Any] = [None] * group.size()
    dist.all_gather_object(held, [(number, piece.start, piece.main.numel()) for number, piece in pieces], group=group)
    owner = _owners(held, group.size())
    rank = group.rank()
    for kind in ("main", *_MOMENTS):
        wanted = {number for number in owner if kind in _kinds(entries[number].data)}
        outgoing = [[p.tensor(kind) for n, p in pieces if n in wanted and owner[n] == to] for to in range(group.size())]
        incoming = [[h for h in of_rank if h[0] in wanted and owner[h[0]] == rank] for of_rank in held]
        empty = torch.empty(0, dtype=torch.float32)
        yield from _assembled(kind, _exchange(outgoing, incoming, empty, group), incoming, entries)


def _owners(held: list[list[tuple[int, int, int]]], num_ranks: int) -> dict[int, int]:
    """The rank that writes each parameter: largest first, to the one with the least so far."""
    elements: dict[int, int] = {}
    for number, _, count in (piece for of_rank in held for piece in of_rank):
        elements[number] = elements.get(number, 0) + count
    load, owner = [0] * num_ranks, {}
    for number in sorted(elements, key=lambda number: (-elements[number], number)):
        owner[number] = load.index(min(load))
        load[owner[number]] += elements[number]
    return owner


def _exchange(
    outgoing: list[list[Tensor]], incoming: list[list[tuple[int, int, int]]], empty: Tensor, group: Any
) -> Tensor:
    """All pieces for this rank, by sending rank, in the order of `incoming`; on the CPU.

    They travel between hosts: moments may be there already, given up for the engines, and beside an engine that is
    awake a GPU has no room for them.
    """
    sent = [sum(tensor.numel() for tensor in to) for to in outgoing]
    received = [sum(count for _, _, count in of_rank) for of_rank in incoming]
    sending = torch.cat([empty, *(tensor.cpu() for to in outgoing for tensor in to)])
    receiving = empty.new_empty(sum(received))
    dist.all_to_all_single(receiving, sending, received, sent, group=group)
    return receiving


def _assembled(
    kind: str, flat: Tensor, incoming: list[list[tuple[int, int, int]]], entries: list[_Entry]
) -> Iterator[tuple[int, str, Tensor]]:
    whole: dict[int, Tensor] = {}
    position = 0
    for number, start, count in (piece for of_rank in incoming for piece in of_rank):
        tensor = whole.setdefault(number, flat.new_empty(entries[number].data.numel()))
        tensor[start : start + count] = flat[position : position + count]
        position += count
    for number, tensor in whole.items():
        yield number, kind, tensor


def _allocate_moments(one: Any) -> None:
    """Give the optimizer the state that it would allocate at its first step."""
    one.init_state_fn(one.optimizer, one.config)
    if _is_torchs(one):
        for state in one.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _is_torchs(one: Any) -> bool:
    """torch's AdamW, which counts steps by parameter; the fused ones count by group."""
    return isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _steps(optimizer: Optimizer) -> int:
    counts = [0]
    for one in _parts(optimizer):
        held = one.optimizer.state.values() if _is_torchs(one) else one.optimizer.param_groups
        counts += [int(item["step"]) for item in held if "step" in item]
    return max(counts)


def _set_steps(one: Any, steps: int) -> None:
    for group in one.optimizer.param_groups:
        if not _is_torchs(one):
            group["step"] = steps
            continue
        for parameter in group["params"]:  # a tensor each: AdamW increments them one by one
            one.optimizer.state[parameter]["step"] = torch.tensor(float(steps))
