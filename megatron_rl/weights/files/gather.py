"""From the shards of all ranks to whole Hugging Face tensors, lazily and in buckets.

Each bucket is one all-gather over the ranks that split its parameters, one broadcast to the other expert-parallel
ranks if it is of experts, and one to the other pipeline stages, whatever the number of tensors in it. A tensor that
stacks experts comes when the last of them has.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.files.local_shards import matrix, rows, shard_parts
from megatron_rl.weights.quantized.fp8_parameters import dequantized


@dataclass(frozen=True)
class _Bucket:
    """Parameters that travel together."""

    source: tuple[int, int | None, torch.dtype]
    """Pipeline stage, expert-parallel rank (None: all of them hold these), dtype."""
    maps: list[TensorMap]


def _layer(name: str) -> str:
    """The layer of a parameter; for those of no layer, its name. A stage holds a layer whole, but for experts."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["decoder", "layers"] else name


class HFTensorIterator:
    """Iterates over the whole policy as (Hugging Face name, full tensor), on every rank alike.

    Collective over the ranks of a replica, with experts over all ranks that share them: every rank must exhaust it, in
    step with the others.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        maps: Sequence[TensorMap],
        groups: Groups,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
    ) -> None:
        """Args:
        parameters: this rank's shards by table name; read anew at each iteration.
        maps: the family's table.
        groups: of this rank.
        dtype: of the parameters, but those that the table keeps in float32; the same on all ranks.
        bucket_bytes: largest bucket, counted in whole parameters; a single larger one travels alone.
        """
        self.parameters = parameters
        self.groups = groups
        self.dtype = dtype
        names: list[list[str]] = [[] for _ in range(groups.pp.size())]
        dist.all_gather_object(names, sorted(parameters), group=groups.pp)
        layers = {_layer(name): stage for stage, held in enumerate(names) for name in held}
        self._stage_of = {tensor_map.name: layers[_layer(tensor_map.name)] for tensor_map in maps}
        self._num_parts = Counter(name for tensor_map in maps for name in tensor_map.hf_shapes)
        self._buckets = self._plan(maps, bucket_bytes)

    def _plan(self, maps: Sequence[TensorMap], bucket_bytes: int) -> list[_Bucket]:
        buckets: list[_Bucket] = []
        room = 0
        for tensor_map in maps:
            shard = torch.Size(tensor_map.shard_shape(0, 1)).numel()
            source = (
                self._stage_of[tensor_map.name],
                tensor_map.expert_parallel_rank(self.groups.ep.size()),
                torch.float32 if tensor_map.float32 else self.dtype,
            )
            size = shard * source[2].itemsize
            if not buckets or size > room or buckets[-1].source != source:
                buckets.append(_Bucket(source, []))
                room = bucket_bytes
            buckets[-1].maps.append(tensor_map)
            room -= size
        return buckets

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        unfinished: dict[str, Tensor] = {}
        parts_left = dict(self._num_parts)
        for bucket in self._buckets:
            shards = self._gather(bucket)
            for index, tensor_map in enumerate(bucket.maps):
                place(tensor_map, [rank[index] for rank in shards], unfinished)
                for name in tensor_map.hf_shapes:
                    parts_left[name] -= 1
                    if not parts_left[name]:
                        yield name, unfinished.pop(name)

    def _gather(self, bucket: _Bucket) -> list[list[Tensor]]:
        """The bucket's shards, indexed [rank in the group that splits them][position in the bucket]."""
        stage, expert_rank, dtype = bucket.source
        pp, ep = self.groups.pp, self.groups.ep
        split_by = self.groups.tp if expert_rank is None else self.groups.etp
        on_stage = stage == pp.rank()
        holds = on_stage and expert_rank in (None, ep.rank())
        mine = [dequantized(self.parameters[m.name], dtype) for m in bucket.maps] if holds else []
        several = split_by.size() > 1 or pp.size() > 1 or (expert_rank is not None and ep.size() > 1)
        if not several:
            return [mine]
        shapes = [[m.shard_shape(rank, split_by.size()) for m in bucket.maps] for rank in range(split_by.size())]
        sizes = [torch.Size(shape).numel() for shape in shapes[0]]
        device = next(iter(self.parameters.values())).device
        everyone = torch.empty(split_by.size(), sum(sizes), dtype=dtype, device=device)
        if holds:
            flat = torch.cat([shard.reshape(-1) for shard in mine])
            dist.all_gather(list(everyone.unbind()), flat, group=split_by)
        if expert_rank is not None and ep.size() > 1 and on_stage:
            dist.broadcast(everyone, src=dist.get_global_rank(ep, expert_rank), group=ep)
        if pp.size() > 1:
            dist.broadcast(everyone, src=dist.get_global_rank(pp, stage), group=pp)
        return [
            [part.view(shape) for part, shape in zip(row.split(sizes), shapes[rank], strict=True)]
            for rank, row in enumerate(everyone)
        ]


def place(tensor_map: TensorMap, shards: list[Tensor], whole: dict[str, Tensor]) -> None:
    """Write every part of every shard to its place in the Hugging Face tensors `whole`, which are added where missing.

    A tensor that one shard is all of is that shard, not a copy.
    """
    if tensor_map.replicated and tensor_map.index is None:
        whole[next(iter(tensor_map.hf_shapes))] = shards[0]
        return
    for name, shape in tensor_map.hf_shapes.items():
        if name not in whole:
            whole[name] = shards[0].new_empty(shape)
    for rank, shard in enumerate(shards):
        for piece in shard_parts(tensor_map, rank, len(shards), shard):
            if piece.row_range.hf_name is not None:
                target = matrix(tensor_map, whole[piece.row_range.hf_name])
                rows(target, tensor_map.dim, piece.row_range).copy_(piece.shard)


def assemble(tensor_map: TensorMap, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of a parameter, given all its shards; of a tensor that stacks experts, its part."""
    whole: dict[str, Tensor] = {}
    place(tensor_map, shards, whole)
    yield from whole.items()
