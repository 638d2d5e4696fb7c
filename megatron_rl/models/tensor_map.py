"""Where every element of a Megatron parameter lives in a Hugging Face checkpoint, as data.

A Megatron shard is a concatenation, along one dimension, of ranges of rows (or columns) of Hugging Face matrices. That
covers every layout: column- and row-parallel matrices, the interleaving of query, key and value heads by group, the
stacking of gate and up projections, the padded vocabulary, KV heads fewer than ranks, and experts, each of which is a
parameter of its own. Some checkpoints keep all experts of a layer in one tensor, transposed, with the rows of gate and
up taking turns: then the matrix is `tensor[index].T`, and a row range takes every second row.

Import reads a shard's row ranges from disk, export and weight sync write them back; nothing else knows the layouts.
Both directions use the same table, so a round trip is exact by construction.

Three fields of a map say which ranks hold what. `expert` says which group splits the parameter: for an expert the
expert-tensor-parallel group of the one expert-parallel rank that holds it (`expert_parallel_rank`), else the
tensor-parallel group, alike on every expert-parallel rank. `replicated`: all ranks of that group hold all of it.
`row_ranges(rank, size)`: what a rank of that group holds. The pipeline stage follows from the layer.

Pure: shapes and names in, row ranges out; no tensor, no process group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RowRange:
    """`size` rows (along the map's dimension) of a Hugging Face matrix, `step` apart, or of zeros (hf_name None)."""

    hf_name: str | None
    start: int
    size: int
    step: int = 1


RowRangesOfRank = Callable[[int, int], list[RowRange]]


@dataclass(frozen=True)
class TensorMap:
    """One Megatron parameter (or persistent buffer) and the Hugging Face tensors that it is made of.

    Attributes:
        name: Megatron's parameter name with the layer number counted over the whole model and the expert's over the
            whole layer, in the names of the unfused (portable) layers.
        hf_shapes: shape of each Hugging Face tensor involved, as stored.
        dim: dimension of the matrices along which row ranges are concatenated.
        replicated: True if every rank of the group that splits it holds all of it.
        row_ranges: (rank, size) in that group -> the row ranges whose concatenation is that rank's shard.
        expert: number of the expert that this is a part of, counted over the whole layer; None: of no expert.
        num_experts: of the layer, if `expert` is a number; expert-parallel ranks share them out evenly, in order.
        index: the matrices are [index] of the tensors, which stack those of all experts; None: the tensors.
        transposed: the matrices are the transposes of what is stored.
        float32: kept in float32, whatever the dtype of the model.
    """

    name: str
    hf_shapes: dict[str, tuple[int, ...]]
    dim: int
    replicated: bool
    row_ranges: RowRangesOfRank
    expert: int | None = None
    num_experts: int = 0
    index: int | None = None
    transposed: bool = False
    float32: bool = False

    def matrix_shape(self, hf_name: str) -> tuple[int, ...]:
        """Shape of the matrix whose rows (along `dim`) the row ranges count."""
        shape = self.hf_shapes[hf_name]
        shape = shape if self.index is None else shape[1:]
        return shape[::-1] if self.transposed else shape

    def shard_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of the shard of that rank in the group that splits the parameter."""
        shape = list(self.matrix_shape(next(iter(self.hf_shapes))))
        shape[self.dim] = sum(rows.size for rows in self.row_ranges(rank, size))
        return tuple(shape)

    def expert_parallel_rank(self, expert_parallel_size: int) -> int | None:
        """The expert-parallel rank that holds it; None if all of them do."""
        return None if self.expert is None else self.expert // (self.num_experts // expert_parallel_size)


def replicated(name: str, hf_name: str, shape: tuple[int, ...], *, float32: bool = False) -> TensorMap:
    """Held whole by every rank: norms, routers, projections down to a latent."""
    return TensorMap(
        name, {hf_name: shape}, 0, True, lambda rank, size: [RowRange(hf_name, 0, shape[0])], float32=float32
    )


def split(name: str, hf_name: str, shape: tuple[int, ...], *, dim: int) -> TensorMap:
    """Split evenly along `dim`: 0 for column-parallel linear layers, 1 for row-parallel ones."""

    def row_ranges(rank: int, size: int) -> list[RowRange]:
        part = shape[dim] // size
        return [RowRange(hf_name, rank * part, part)]

    return TensorMap(name, {hf_name: shape}, dim, False, row_ranges)


def gate_up(name: str, gate: str, up: str, shape: tuple[int, ...]) -> TensorMap:
    """Gated MLP: each rank stacks its part of the gate projection on its part of the up projection."""

    def row_ranges(rank: int, size: int) -> list[RowRange]:
        part = shape[0] // size
        return [RowRange(gate, rank * part, part), RowRange(up, rank * part, part)]

    return TensorMap(name, {gate: shape, up: shape}, 0, False, row_ranges)


def alternating_gate_up(name: str, hf_name: str, shape: tuple[int, ...]) -> TensorMap:
    """Gated MLP, stored as one matrix whose even rows are the gate projection and whose odd rows are the up one."""

    def row_ranges(rank: int, size: int) -> list[RowRange]:
        part = shape[0] // 2 // size
        return [RowRange(hf_name, 2 * rank * part + odd, part, step=2) for odd in (0, 1)]

    return TensorMap(name, {hf_name: shape}, 0, False, row_ranges)


def of_expert(tensor_map: TensorMap, expert: int, num_experts: int) -> TensorMap:
    """The same, of one expert of a layer that has `num_experts`."""
    return replace(tensor_map, expert=expert, num_experts=num_experts)


def stacked(experts: Sequence[TensorMap], *, transposed: bool = False) -> list[TensorMap]:
    """The same parameters, of one expert each, where a tensor stacks the (transposed) matrices of all of them."""
    return [
        replace(
            expert,
            hf_shapes={
                name: (len(experts), *(shape[::-1] if transposed else shape))
                for name, shape in expert.hf_shapes.items()
            },
            index=index,
            transposed=transposed,
        )
        for index, expert in enumerate(experts)
    ]


def qkv(
    name: str, q: str, k: str, v: str, *, num_heads: int, num_groups: int, head_dim: int, columns: tuple[int, ...]
) -> TensorMap:
    """Attention input projection (or its bias, with columns=()).

    Megatron's rows are, for each KV group: the query heads of the group, its key head, its value head. Ranks split
    these rows evenly, also where that cuts through a group (fewer groups than ranks).
    """
    q_rows = num_heads // num_groups * head_dim
    group_rows = q_rows + 2 * head_dim

    def row_ranges(rank: int, size: int) -> list[RowRange]:
        part = num_groups * group_rows // size
        begin, end = rank * part, (rank + 1) * part
        pieces = []
        for group in range(begin // group_rows, -(-end // group_rows)):
            top = group * group_rows
            for hf_name, offset, rows in ((q, 0, q_rows), (k, q_rows, head_dim), (v, q_rows + head_dim, head_dim)):
                first, last = max(begin, top + offset), min(end, top + offset + rows)
                if first < last:
                    pieces.append(RowRange(hf_name, group * rows + first - top - offset, last - first))
        return pieces

    shapes = {q: (num_heads * head_dim, *columns)} | dict.fromkeys((k, v), (num_groups * head_dim, *columns))
    return TensorMap(name, shapes, 0, False, row_ranges)


def padded_vocabulary_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding and the output layer in Megatron: the next multiple of the tensor-parallel size."""
    return -(-vocab_size // tp_size) * tp_size


def vocabulary(name: str, hf_name: str, shape: tuple[int, ...]) -> TensorMap:
    """Embedding or output layer: rows split over the ranks after padding with zeros to a multiple of their number."""

    def row_ranges(rank: int, size: int) -> list[RowRange]:
        part = padded_vocabulary_size(shape[0], size) // size
        first = min(rank * part, shape[0])
        real = min(part, shape[0] - first)
        pieces = [RowRange(hf_name, first, real)] if real else []
        return pieces + ([RowRange(None, 0, part - real)] if part > real else [])

    return TensorMap(name, {hf_name: shape}, 0, False, row_ranges)
