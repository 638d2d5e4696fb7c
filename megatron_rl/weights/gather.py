"""From the shards of all ranks to whole Hugging Face tensors, lazily and in buckets.

Export and live sync read the policy through one iterator. Each bucket is one all-gather over the tensor-parallel
ranks of the pipeline stage that holds it and one broadcast to the other stages, whatever the number of tensors in it.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.fp8_parameters import held_value
from megatron_rl.weights.runs import rows, runs_of_shard


class HFTensorIterator:
    """Iterates over the whole policy as (Hugging Face name, full tensor), on every rank alike.

    Collective over `groups.tp` and `groups.pp`: every rank of a replica must exhaust it, in step with the others.
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
        dtype: of the parameters, the same on all ranks.
        bucket_bytes: largest bucket, counted in whole Hugging Face tensors; a single larger one travels alone.
        """
        self.parameters = parameters
        self.groups = groups
        self.dtype = dtype
        names: list[list[str]] = [[] for _ in range(groups.pp.size())]
        dist.all_gather_object(names, sorted(parameters), group=groups.pp)
        self._stage_of = {name: stage for stage, held in enumerate(names) for name in held}
        self._buckets = self._plan(maps, bucket_bytes)

    def _plan(self, maps: Sequence[TensorMap], bucket_bytes: int) -> list[list[TensorMap]]:
        buckets: list[list[TensorMap]] = []
        room, stage = 0, -1
        for tensor_map in maps:
            size = sum(torch.Size(shape).numel() for shape in tensor_map.hf_shapes.values()) * self.dtype.itemsize
            if size > room or self._stage_of[tensor_map.name] != stage:
                buckets.append([])
                room, stage = bucket_bytes, self._stage_of[tensor_map.name]
            buckets[-1].append(tensor_map)
            room -= size
        return buckets

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in self._buckets:
            shards = self._gather(bucket)
            for index, tensor_map in enumerate(bucket):
                yield from assemble(tensor_map, [rank[index] for rank in shards])

    def _gather(self, bucket: list[TensorMap]) -> list[list[Tensor]]:
        """The bucket's shards, indexed [tp_rank][position in the bucket]."""
        tp, pp = self.groups.tp, self.groups.pp
        stage = self._stage_of[bucket[0].name]
        mine = [held_value(self.parameters[m.name], self.dtype) for m in bucket] if stage == pp.rank() else []
        if tp.size() == pp.size() == 1:
            return [mine]
        shapes = [[m.shard_shape(rank, tp.size()) for m in bucket] for rank in range(tp.size())]
        sizes = [torch.Size(shape).numel() for shape in shapes[0]]
        device = next(iter(self.parameters.values())).device
        everyone = torch.empty(tp.size(), sum(sizes), dtype=self.dtype, device=device)
        if mine:
            flat = torch.cat([shard.reshape(-1) for shard in mine])
            dist.all_gather(list(everyone.unbind()), flat, group=tp)
        if pp.size() > 1:
            dist.broadcast(everyone, src=dist.get_global_rank(pp, stage), group=pp)
        return [
            [part.view(shape) for part, shape in zip(row.split(sizes), shapes[rank], strict=True)]
            for rank, row in enumerate(everyone)
        ]


def assemble(tensor_map: TensorMap, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Write every run of every shard back to its place in the Hugging Face tensors."""
    if tensor_map.replicated:
        yield next(iter(tensor_map.hf_shapes)), shards[0]
        return
    whole = {name: shards[0].new_empty(shape) for name, shape in tensor_map.hf_shapes.items()}
    for rank, shard in enumerate(shards):
        for piece in runs_of_shard(tensor_map, rank, len(shards), shard):
            if piece.run.hf_name is not None:
                rows(whole[piece.run.hf_name], tensor_map.dim, piece.run).copy_(piece.shard)
    yield from whole.items()
