"""Where every element of a Megatron parameter lives in a Hugging Face checkpoint, as data.

A Megatron shard is a concatenation, along one dimension, of runs of rows (or columns) of Hugging Face tensors. That
sentence covers every layout of a dense decoder: column- and row-parallel matrices, the interleaving of query, key and
value heads by group, the stacking of gate and up projections, the padded vocabulary, and KV heads fewer than ranks.
Import reads a shard's runs from disk, export and live weight sync write them back; nothing else knows the layouts,
and the same table serves both directions, so a round trip is exact by construction.

Pure: shapes and names in, runs out; no tensor, no process group.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """`size` consecutive rows (along the map's dimension) of a Hugging Face tensor, or of zeros (hf_name None)."""

    hf_name: str | None
    start: int
    size: int


RunsOfRank = Callable[[int, int], list[Run]]


@dataclass(frozen=True)
class TensorMap:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    Attributes:
        name: Megatron's parameter name with the layer number counted over the whole model, in the names of the
            unfused (portable) layers.
        hf_shapes: shape of each Hugging Face tensor involved.
        dim: dimension along which runs are concatenated.
        replicated: True if every tensor-parallel rank holds all of it.
        runs: (tp_rank, tp_size) -> the runs whose concatenation is that rank's shard.
    """

    name: str
    hf_shapes: dict[str, tuple[int, ...]]
    dim: int
    replicated: bool
    runs: RunsOfRank

    def shard_shape(self, tp_rank: int, tp_size: int) -> tuple[int, ...]:
        """Shape of that rank's shard."""
        shape = list(next(iter(self.hf_shapes.values())))
        shape[self.dim] = sum(run.size for run in self.runs(tp_rank, tp_size))
        return tuple(shape)


def replicated(name: str, hf_name: str, shape: tuple[int, ...]) -> TensorMap:
    """Held whole by every rank: norms."""
    return TensorMap(name, {hf_name: shape}, 0, True, lambda rank, size: [Run(hf_name, 0, shape[0])])


def split(name: str, hf_name: str, shape: tuple[int, ...], *, dim: int) -> TensorMap:
    """Split evenly along `dim`: 0 for column-parallel linear layers, 1 for row-parallel ones."""

    def runs(rank: int, size: int) -> list[Run]:
        part = shape[dim] // size
        return [Run(hf_name, rank * part, part)]

    return TensorMap(name, {hf_name: shape}, dim, False, runs)


def gate_up(name: str, gate: str, up: str, shape: tuple[int, ...]) -> TensorMap:
    """Gated MLP: each rank stacks its part of the gate projection on its part of the up projection."""

    def runs(rank: int, size: int) -> list[Run]:
        part = shape[0] // size
        return [Run(gate, rank * part, part), Run(up, rank * part, part)]

    return TensorMap(name, {gate: shape, up: shape}, 0, False, runs)


def qkv(
    name: str, q: str, k: str, v: str, *, num_heads: int, num_groups: int, head_dim: int, columns: tuple[int, ...]
) -> TensorMap:
    """Attention input projection (or its bias, with columns=()).

    Megatron's rows are, for each KV group: the query heads of the group, its key head, its value head. Ranks split
    these rows evenly, also where that cuts through a group (fewer groups than ranks).
    """
    q_rows = num_heads // num_groups * head_dim
    group_rows = q_rows + 2 * head_dim

    def runs(rank: int, size: int) -> list[Run]:
        part = num_groups * group_rows // size
        begin, end = rank * part, (rank + 1) * part
        pieces = []
        for group in range(begin // group_rows, -(-end // group_rows)):
            top = group * group_rows
            for hf_name, offset, rows in ((q, 0, q_rows), (k, q_rows, head_dim), (v, q_rows + head_dim, head_dim)):
                first, last = max(begin, top + offset), min(end, top + offset + rows)
                if first < last:
                    pieces.append(Run(hf_name, group * rows + first - top - offset, last - first))
        return pieces

    shapes = {q: (num_heads * head_dim, *columns)} | dict.fromkeys((k, v), (num_groups * head_dim, *columns))
    return TensorMap(name, shapes, 0, False, runs)


def padded_vocabulary_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding and the output layer in Megatron: the next multiple of the tensor-parallel size."""
    return -(-vocab_size // tp_size) * tp_size


def vocabulary(name: str, hf_name: str, shape: tuple[int, ...]) -> TensorMap:
    """Embedding or output layer: rows split over the ranks after padding with zeros to a multiple of their number."""

    def runs(rank: int, size: int) -> list[Run]:
        part = padded_vocabulary_size(shape[0], size) // size
        first = min(rank * part, shape[0])
        real = min(part, shape[0] - first)
        pieces = [Run(hf_name, first, real)] if real else []
        return pieces + ([Run(None, 0, part - real)] if part > real else [])

    return TensorMap(name, {hf_name: shape}, 0, False, runs)
