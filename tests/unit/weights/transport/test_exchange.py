"""Plans carried out through files by threads: one sends, the others receive; and what they say when it goes wrong."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.models.tensor_map import TensorMap, gate_up, replicated, vocabulary
from megatron_rl.weights.plan.engine_table import engine_maps
from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.plan.ranks import EngineRanks, TrainedRanks
from megatron_rl.weights.plan.shard_plan import ShardPlan, Slice
from megatron_rl.weights.transport.exchange import Exchange, verified
from megatron_rl.weights.transport.folder import FolderTransport
from megatron_rl.weights.transport.messages import TransferError, add, checksum

HIDDEN = 6
MAPS: list[TensorMap] = [
    vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", (70, HIDDEN)),
    replicated("decoder.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight", (HIDDEN,)),
    gate_up("fc1.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight", (8, HIDDEN)),
]


@dataclass
class Memory:
    """Takes slices into tensors, and sums up the checksums that came with them."""

    rank_plan: RankPlan
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {name: torch.zeros(shape) for name, shape in self.rank_plan.shard.shapes.items()}

    def write(self, piece: Slice, values: Tensor, expected: int | None) -> None:
        self.tensors[piece.target][piece.block.target_index] = values
        if expected is not None:
            self.sums[piece.target] = add(self.sums.get(piece.target, 0), expected)

    def end_bucket(self) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "round").mkdir()
    return tmp_path / "round"


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {m.name: torch.randn(m.shard_shape(0, 1), generator=generator) for m in MAPS}


def plan() -> ShardPlan:
    trained = TrainedRanks(1, 1, 1, (0,)).entries(MAPS, lambda _: "float32")
    targets = engine_maps(MAPS, num_key_value_heads=1)
    return ShardPlan(
        trained, EngineRanks(1, 2, (0,), first_rank=1).entries(targets, lambda _: "float32"), bucket_bytes=300
    )


def run(
    folder: Path, *, versions: tuple[int, int] = (1, 1), timeout: float = 10.0, tamper: Callable[[], None] | None = None
) -> list[Memory]:
    """Send from rank 0 to ranks 1 and 2; the error that a receiver raised, if one did."""
    whole = plan()
    memories = [Memory(RankPlan.from_text(RankPlan.of(whole, rank, {}).to_text())) for rank in (1, 2)]
    errors: list[BaseException] = []

    def caught(rank: int, version: int, held: dict[str, Tensor], memory: Memory | None, rank_plan: RankPlan) -> None:
        transport = FolderTransport(folder, rank, timeout_seconds=timeout)
        try:
            if memory is not None and tamper is not None:
                tamper()
            Exchange(rank_plan).run(held, memory, transport, version=version, verify=verified("full", version))
        except TransferError as error:
            transport.fail(str(error))
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(0, versions[0], parameters(), None, RankPlan.of(whole, 0, {})))]
    threads += [
        threading.Thread(target=caught, args=(1 + i, versions[1], {}, memory, memory.rank_plan))
        for i, memory in enumerate(memories)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return memories


def test_two_ranks_get_their_shards_and_their_checksums(folder: Path) -> None:
    held = parameters()
    embedding = torch.zeros(128, HIDDEN)
    embedding[:70] = held["embedding.word_embeddings.weight"]
    gate, up = held["fc1.weight"].chunk(2)
    for t, memory in enumerate(run(folder)):
        expected = {
            "model.embed_tokens.weight": embedding[64 * t : 64 * (t + 1)],
            "model.layers.0.input_layernorm.weight": held["decoder.layers.0.input_layernorm.weight"],
            "model.layers.0.mlp.gate_up_proj.weight": torch.cat([gate[4 * t : 4 * t + 4], up[4 * t : 4 * t + 4]]),
        }
        assert memory.tensors.keys() == expected.keys()
        assert all(torch.equal(memory.tensors[name], expected[name]) for name in expected)
        assert memory.sums == {name: checksum(tensor) for name, tensor in expected.items()}
    assert list(folder.iterdir()) == []


def test_a_flipped_bit_is_never_loaded(tmp_path: Path, folder: Path) -> None:
    def flip() -> None:
        while not (folder / "0.0.1").exists():
            pass
        with (tmp_path / "slot0.0.1").open("r+b") as stream:
            stream.seek(20)
            byte = stream.read(1)[0]
            stream.seek(20)
            stream.write(bytes([byte ^ 1]))

    with pytest.raises(
        TransferError, match=r"from rank 0, bucket 0 \(parameters from model.embed_tokens.weight on\): damaged"
    ):
        run(folder, tamper=once(flip))


def once(action: Callable[[], None]) -> Callable[[], None]:
    lock, done = threading.Lock(), threading.Event()

    def first() -> None:
        with lock:
            if not done.is_set():
                action()
                done.set()

    return first


def test_another_version_is_refused(folder: Path) -> None:
    with pytest.raises(TransferError, match=r"from rank 0, bucket 0 \(.*\): version 7, expected 8"):
        run(folder, versions=(7, 8))


def test_a_late_peer_is_named(folder: Path) -> None:
    rank_plan = RankPlan.of(plan(), 1, {})
    with pytest.raises(TransferError, match=r"from rank 0 to rank 1, bucket 0: rank 0 has not sent them within 0.05 s"):
        Exchange(rank_plan).run({}, Memory(rank_plan), FolderTransport(folder, 1, timeout_seconds=0.05), version=1)
    sender = RankPlan.of(plan(), 0, {})
    with pytest.raises(
        TransferError, match=r"from rank 0 to rank 1, bucket 0: rank 1 has not taken them within 0.05 s"
    ):
        Exchange(sender).run(parameters(), None, FolderTransport(folder, 0, timeout_seconds=0.05), version=1)


def test_a_failed_peer_ends_the_wait_at_once(folder: Path) -> None:
    FolderTransport(folder, 2, timeout_seconds=60).fail("out of memory")
    rank_plan = RankPlan.of(plan(), 1, {})
    with pytest.raises(TransferError, match="given up: out of memory"):
        Exchange(rank_plan).run({}, Memory(rank_plan), FolderTransport(folder, 1, timeout_seconds=60), version=1)


def test_at_most_two_buckets_exist(folder: Path) -> None:
    """A sender whose receiver takes nothing has published two buckets, of the plan's many, when it gives up."""
    sender = RankPlan.of(plan(), 0, {})
    assert len(sender.buckets) > 5
    with pytest.raises(TransferError):
        Exchange(sender).run(parameters(), None, FolderTransport(folder, 0, timeout_seconds=0.05), version=1)
    assert {file.name.split(".")[0] for file in folder.iterdir()} == {"0", "1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_checksums_add_up_over_blocks_in_any_order(dtype: torch.dtype) -> None:
    whole = torch.randn(7, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    blocks = [(0, 0, 3, 10), (3, 4, 4, 6), (3, 0, 4, 4)]
    total = 0
    for row, column, rows, columns in blocks[::-1]:
        total = add(total, checksum(whole[row : row + rows, column : column + columns], (row, column)))
    assert total == checksum(whole)
    # Every second row, as gate and up alternate in some checkpoints.
    assert add(checksum(whole[0::2], (0, 0), 2), checksum(whole[1::2], (1, 0), 2)) == checksum(whole)


def test_checksums_see_bits_rows_and_columns() -> None:
    whole = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    flipped = whole.clone()
    flipped.view(torch.int32)[3, 4] ^= 1
    others = [flipped, whole.roll(1, 0), whole.roll(1, 1), whole.flip(0), -whole]
    assert len({checksum(x) for x in [whole, *others]}) == 6
    # In closed form: bits at (i, j) weigh 1 - 7046029254386353131 i - 8116567392432202711 j.
    single = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    weight = 1 - 7046029254386353131 - 8116567392432202711
    assert checksum(single) == (0x3F800000 * weight + 2**63) % 2**64 - 2**63


def test_sampled_parameters_differ_from_version_to_version_and_all_come_up() -> None:
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(100)]
    chosen = [{name for name in names if verified("sample", version)(name)} for version in range(16)]
    assert set.union(*chosen) == set(names)
    assert sum(map(len, chosen)) == 100
    assert not any(verified("off", 3)(name) for name in names)
