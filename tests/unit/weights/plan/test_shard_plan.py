"""The shard plan on numpy arrays against whole tensors, converted and then cut as vLLM cuts them.

The expected shards are written out with numpy in tests/vllm_shards.py. Trained shards are cut from whole tensors by the
families' row ranges, which have tests of their own.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.models.tensor_map import TensorMap, gate_up, of_expert, qkv, replicated, split, vocabulary
from megatron_rl.weights.plan import cuts
from megatron_rl.weights.plan.engine_table import engine_maps, hf_shapes
from megatron_rl.weights.plan.ranks import EngineRanks, TrainedRanks, even_stages
from megatron_rl.weights.plan.shard_plan import ShardPlan
from tests.vllm_shards import vllm_shards

Array = npt.NDArray[np.float64]
ITEMSIZE = 4  # float32


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    layers: int
    vocab: int
    experts: int = 0
    tied: bool = False
    mla: bool = False
    bias: bool = False

    def maps(self) -> list[TensorMap]:
        """The table of a trained model, from the same primitives as the families'."""
        h = self.hidden
        maps = [vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", (self.vocab, h))]
        for layer in range(self.layers):
            a, b = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            maps.append(replicated(f"{a}input_layernorm.weight", f"{b}input_layernorm.weight", (h,)))
            maps += self._attention(f"{a}self_attention.", f"{b}self_attn.")
            maps += self._mlp(f"{a}mlp.", f"{b}mlp.")
        maps.append(replicated("decoder.final_layernorm.weight", "model.norm.weight", (h,)))
        if not self.tied:
            maps.append(vocabulary("output_layer.weight", "lm_head.weight", (self.vocab, h)))
        return maps

    def _attention(self, a: str, b: str) -> list[TensorMap]:
        width = self.heads * self.head_dim
        out = split(f"{a}linear_proj.weight", f"{b}o_proj.weight", (self.hidden, width), dim=1)
        if self.mla:
            return [
                replicated(f"{a}linear_q_down_proj.weight", f"{b}q_a_proj.weight", (6, self.hidden)),
                replicated(f"{a}linear_kv_down_proj.weight", f"{b}kv_a_proj_with_mqa.weight", (5, self.hidden)),
                split(f"{a}linear_q_up_proj.weight", f"{b}q_b_proj.weight", (width, 6), dim=0),
                split(f"{a}linear_kv_up_proj.weight", f"{b}kv_b_proj.weight", (2 * width, 4), dim=0),
                out,
            ]
        sizes: dict[str, Any] = dict(num_heads=self.heads, num_groups=self.groups, head_dim=self.head_dim)
        kinds = {"weight": (self.hidden,)} | ({"bias": ()} if self.bias else {})
        return [
            qkv(f"{a}linear_qkv.{kind}", *(f"{b}{x}_proj.{kind}" for x in "qkv"), columns=columns, **sizes)
            for kind, columns in kinds.items()
        ] + [out]

    def _mlp(self, a: str, b: str) -> list[TensorMap]:
        up, down = (self.ffn, self.hidden), (self.hidden, self.ffn)
        stems = [(f"{a}experts.local_experts.{e}.", f"{b}experts.{e}.") for e in range(self.experts)] or [(a, b)]
        maps = [replicated(f"{a}router.weight", f"{b}gate.weight", (self.experts, self.hidden))] if self.experts else []
        for number, (mine, theirs) in enumerate(stems):
            both = [
                gate_up(f"{mine}linear_fc1.weight", f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight", up),
                split(f"{mine}linear_fc2.weight", f"{theirs}down_proj.weight", down, dim=1),
            ]
            maps += [of_expert(m, number, self.experts) for m in both] if self.experts else both
        return maps


@dataclass(frozen=True)
class Case:
    """A model between two layouts."""

    model: Model
    trained: TrainedRanks
    engines: EngineRanks
    bucket_bytes: int

    def plan(self) -> ShardPlan:
        maps = self.model.maps()
        targets_of = engine_maps(maps, num_key_value_heads=self.model.groups)
        sources = self.trained.entries(maps, lambda _: "float32")
        targets = self.engines.entries(targets_of, lambda _: "float32")
        return ShardPlan(sources, targets, bucket_bytes=self.bucket_bytes)


def whole_tensors(model: Model) -> dict[str, Array]:
    """Every element of the model has a value of its own."""
    tensors, first = {}, 1
    for name, shape in hf_shapes(model.maps()).items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(first, first + size, dtype=np.float64).reshape(shape)
        first += size
    return tensors


def trained_shards(case: Case, whole: dict[str, Array]) -> dict[int, dict[str, Array]]:
    held: dict[int, dict[str, Array]] = {rank: {} for rank in range(case.trained.world_size)}
    for entry in case.trained.entries(case.model.maps(), lambda _: "float32"):
        for shard, ranks in enumerate(entry.shards):
            parts = []
            for row_range in entry.map.row_ranges(shard, len(entry.shards)):
                shape = list(next(iter(entry.map.hf_shapes.values())))
                shape[entry.map.dim] = row_range.size
                rows = range(row_range.start, row_range.start + row_range.size)
                source = (
                    np.zeros(shape)
                    if row_range.hf_name is None
                    else whole[row_range.hf_name].take(rows, axis=entry.map.dim)
                )
                parts.append(source)
            for rank in ranks:
                held[rank][entry.map.name] = np.concatenate(parts, axis=entry.map.dim)
    return held


def engine_shards(case: Case, whole: dict[str, Array], rank: int) -> dict[str, Array]:
    """What a rank's parameters hold after vLLM has loaded the whole tensors."""
    engines, place = case.engines, rank - case.engines.first_rank
    spread = np.array_split(np.arange(case.model.experts), engines.world_size)[place].tolist()
    experts = range(spread[0], spread[-1] + 1) if engines.expert_parallel else None
    tp, heads = engines.tensor, case.model.groups
    return vllm_shards(whole, num_key_value_heads=heads, tp=tp, rank=place % tp, experts=experts)


def execute(plan: ShardPlan, held: dict[int, dict[str, Array]], receivers: range) -> dict[int, dict[str, Array]]:
    """Copy every slice from the sender that the plan names; asserts that both ends agree and nothing comes twice."""
    received: dict[int, dict[str, Array]] = {}
    for rank in receivers:
        received[rank] = {name: np.full(shape, np.nan) for name, shape in plan.targets_of(rank).items()}
        for name, dim, start, size in plan.zeros(rank):
            received[rank][name].swapaxes(0, dim)[start : start + size] = 0
    for bucket in range(plan.num_buckets):
        for rank in receivers:
            for sender, slices in plan.receives(rank, bucket).items():
                assert plan.sends(sender, bucket)[rank] == slices
                for piece in slices:
                    block = piece.block
                    source = held[sender][piece.source][block.source_index]
                    target = received[rank][piece.target][block.target_index]
                    assert np.isnan(target).all(), f"{piece.target} is written twice"
                    target[...] = source
    return received


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.sampled_from([1, 2, 4]))
    heads = groups * draw(st.sampled_from([n for n in (1, 2, 4) if groups * n >= 4]))
    kind = draw(st.sampled_from(["dense", "moe", "mla", "mla_moe"]))
    experts = draw(st.sampled_from([4, 8])) if "moe" in kind else 0
    layers = draw(st.integers(2, 3))
    model = Model(
        hidden=draw(st.sampled_from([4, 12])),
        heads=heads,
        groups=groups,
        head_dim=4,
        ffn=8,
        layers=layers,
        vocab=draw(st.integers(5, 70)),
        experts=experts,
        tied=draw(st.booleans()),
        mla="mla" in kind,
        bias=draw(st.booleans()),
    )
    tensor, context, data = (draw(st.sampled_from(sizes)) for sizes in ([1, 2, 4], [1, 2], [1, 2, 3]))
    stage_size = tensor * context * data
    expert_tensor = draw(st.sampled_from([n for n in (1, 2) if stage_size % n == 0]))
    expert = draw(st.sampled_from([n for n in (1, 2, 4) if stage_size % (expert_tensor * n) == 0]))
    pipeline = draw(st.integers(1, 2))
    trained = TrainedRanks(tensor, pipeline, data, even_stages(layers, pipeline), context, expert, expert_tensor)
    engine_tensor = draw(st.sampled_from([1, 2, 4]))
    engine_pipeline = draw(st.integers(1, 2))
    spread = bool(experts) and engine_pipeline == 1 and draw(st.booleans())
    colocated = draw(st.booleans())
    size = engine_tensor * engine_pipeline
    num_engines = draw(st.integers(1, 3)) if not colocated else max(1, trained.world_size // size)
    engines = EngineRanks(
        num_engines,
        engine_tensor,
        even_stages(layers, engine_pipeline),
        pipeline=engine_pipeline,
        first_rank=0 if colocated and num_engines * size <= trained.world_size else trained.world_size,
        expert_parallel=spread and experts >= num_engines * size,
        num_experts=experts,
        tied=model.tied,
    )
    return Case(model, trained, engines, draw(st.sampled_from([64, 1000, 10**6])))


def stage_of(case: Case, name: str) -> int:
    return next(p for p in range(case.engines.pipeline) if name in stage_names(case, p))


def stage_names(case: Case, stage: int) -> set[str]:
    names = set()
    for tensor in engine_maps(case.model.maps(), num_key_value_heads=case.model.groups):
        name, last = tensor.name, case.engines.pipeline - 1
        if name.startswith("model.layers."):
            stages = {case.engines.stage_of_layer[int(name.split(".")[2])]}
        elif name.startswith("model.embed_tokens."):
            stages = {0, last} if case.model.tied else {0}
        else:
            stages = {last}
        if stage in stages:
            names.add(name)
    return names


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_the_plan_equals_converting_whole_tensors_and_cutting_them_as_vllm_does(case: Case) -> None:
    plan = case.plan()
    whole = whole_tensors(case.model)
    held = trained_shards(case, whole)
    receivers = range(case.engines.first_rank, case.engines.first_rank + case.engines.world_size)
    received = execute(plan, held, receivers)
    traffic: Counter[tuple[int, int]] = Counter()
    for rank in receivers:
        stage = (rank - case.engines.first_rank) // case.engines.tensor % case.engines.pipeline
        mine = stage_names(case, stage)
        expected = {name: x for name, x in engine_shards(case, whole, rank).items() if name in mine}
        assert received[rank].keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(received[rank][name], array, err_msg=f"rank {rank}: {name}")
    # Bytes: each real element of a shard travels once, unless the rank held it already, and then it does not.
    for bucket in range(plan.num_buckets):
        for rank in receivers:
            for sender, slices in plan.receives(rank, bucket).items():
                traffic[sender, rank] += sum(piece.num_bytes for piece in slices)
    assert traffic == plan.traffic()
    for rank in receivers:
        own = set(np.concatenate([x.ravel() for x in held[rank].values()])) if rank in held else set()
        needed = np.concatenate([x.ravel() for x in received[rank].values()])
        absent = sum(value not in own for value in needed if value != 0)
        assert sum(n for (a, b), n in traffic.items() if b == rank and a != b) == absent * ITEMSIZE


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 99))
def test_replicas_share_the_work(case: Case, seed: int) -> None:
    """Without the limit on small cuts, no replica sends 10% more than its peers' mean, but for the rows of a cut."""
    model = dataclasses.replace(case.model, hidden=16, ffn=128, head_dim=32, vocab=640)
    size = case.engines.pipeline * case.engines.tensor
    engines = dataclasses.replace(case.engines, first_rank=case.trained.world_size, num_engines=1 + seed % 5)
    engines = dataclasses.replace(
        engines, expert_parallel=engines.expert_parallel and model.experts >= engines.num_engines * size
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "_MIN_CUT_BYTES", 1)
        plan = dataclasses.replace(case, model=model, engines=engines, bucket_bytes=10**9).plan()
        sent: Counter[int] = Counter()
        for (sender, _), n in plan.traffic().items():
            sent[sender] += n
    stage_size = case.trained.stage_size
    for first in range(0, case.trained.world_size, stage_size):
        # Ranks with the same shards, dense and expert, differ in nothing but their turn.
        groups: dict[tuple[int, int], list[int]] = {}
        expert_ranks = case.trained.expert * case.trained.expert_tensor
        for rank in range(stage_size):
            groups.setdefault((rank % case.trained.tensor, rank % expert_ranks), []).append(sent[first + rank])
        for of_group in groups.values():
            assert max(of_group) <= 1.1 * np.mean(of_group) + 6 * model.hidden * ITEMSIZE


def test_buckets_are_bounded_and_in_the_order_of_the_layers() -> None:
    model = Model(hidden=16, heads=4, groups=2, head_dim=8, ffn=64, layers=3, vocab=100)
    case = Case(model, TrainedRanks(1, 1, 1, (0, 0, 0)), EngineRanks(1, 2, (0, 0, 0), first_rank=1), 2000)
    plan = case.plan()
    for rank in (1, 2):
        layers = []
        for bucket in range(plan.num_buckets):
            slices = [piece for of_sender in plan.receives(rank, bucket).values() for piece in of_sender]
            # A block is cut between rows, so that a bucket may end a row later: at most 64 bytes for each of 3 blocks.
            assert sum(piece.num_bytes for piece in slices) <= 2000 + 3 * 64
            layers += [int(piece.target.split(".")[2]) for piece in slices if ".layers." in piece.target]
        assert layers == sorted(layers)
        assert set(layers) == {0, 1, 2}
    assert plan.num_buckets > 5


def test_engines_are_served_by_different_replicas() -> None:
    model = Model(hidden=256, heads=4, groups=4, head_dim=64, ffn=512, layers=1, vocab=640)
    case = Case(model, TrainedRanks(1, 1, 4, (0,)), EngineRanks(4, 1, (0,), first_rank=4), 10**9)
    large = {(a, b) for (a, b), n in case.plan().traffic().items() if n > 64 * 1024}
    assert large == {(0, 4), (1, 5), (2, 6), (3, 7)}


def test_a_missing_tensor_is_named() -> None:
    model = Model(hidden=4, heads=4, groups=4, head_dim=4, ffn=8, layers=1, vocab=5)
    maps = model.maps()
    targets = EngineRanks(1, 1, (0,)).entries(engine_maps(maps, num_key_value_heads=4), lambda _: "float32")
    some = [tensor_map for tensor_map in maps if "fc2" not in tensor_map.name]
    with pytest.raises(ValueError, match=r"needs model.layers.0.mlp.down_proj.weight, which no trained"):
        ShardPlan(TrainedRanks(1, 1, 1, (0,)).entries(some, lambda _: "float32"), targets, bucket_bytes=100)
    # A table that leaves out rows is as wrong as one that has them twice.
    short = [
        dataclasses.replace(m, row_ranges=lambda r, s, m=m: m.row_ranges(r, s)[:-1]) if "fc1" in m.name else m
        for m in maps
    ]
    with pytest.raises(ValueError, match=r"gate_up_proj.weight: decoder.layers.0.mlp.linear_fc1.weight make 32 of"):
        ShardPlan(TrainedRanks(1, 1, 1, (0,)).entries(short, lambda _: "float32"), targets, bucket_bytes=100)
