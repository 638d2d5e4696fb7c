"""Times a weight synchronisation of a 0.5B-parameter model against a plain copy of the same bytes.

    python -m tools.bench_weight_sync [--layers 24] [--repeats 5]

One process holds the trained model's tensors (Qwen2.5-0.5B's sizes, bfloat16, random) and a vLLM engine. All figures
are medians of one run, on one core, and mean something only beside each other:

    memory copy              of as many bytes, tensor by tensor: the floor
    colocated, into memory   the plan carried out into tensors of the engine's shapes
    shared memory            the same into another process, through /dev/shm
    network                  the same over TCP, on the loopback device
    network, 2% changed      with changed elements alone, both sides keeping a copy of what was sent
    colocated, into vLLM     the same with vLLM's preparation of each layer for its kernels
    whole tensors            exported by name and given to vLLM's own loader, as `reload_weights` does

and the memory that a synchronisation takes on top, while it runs.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from megatron_rl.models.families import family_of
from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.weights.plan.engine_table import engine_maps
from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.plan.ranks import EngineRanks, TrainedRanks
from megatron_rl.weights.plan.shard_plan import ShardPlan, Slice
from megatron_rl.weights.transport.exchange import Exchange, Pending
from megatron_rl.weights.transport.folder import FolderTransport
from megatron_rl.weights.transport.sockets import Endpoint, Listener, connect
from tools.bench_log_probs import PeakMemory

BUCKET = 64 << 20
HOST = "127.0.0.1"
SIZES = dict(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


class NoPeers:
    """A transport for a rank that has everything itself."""

    def allocate(self, bucket: int, receiver: int, num_bytes: int) -> Tensor:
        raise AssertionError("nothing is sent")

    def post(self, bucket: int, outgoing: object, incoming: object) -> Pending:
        return self  # type: ignore[return-value]

    def sent(self) -> None:
        """Nothing was."""


class Memory:
    """A loader into plain tensors of the engine's shapes."""

    def __init__(self, rank_plan: RankPlan) -> None:
        self.tensors = {n: torch.zeros(shape, dtype=torch.bfloat16) for n, shape in rank_plan.shard.shapes.items()}

    def write(self, piece: Slice, values: Tensor, expected: int | None) -> None:
        self.tensors[piece.target][piece.block.target_index].copy_(values)

    def end_bucket(self) -> None:
        """Nothing to prepare."""


def plan(maps: list[TensorMap], layers: int, first_rank: int) -> ShardPlan:
    trained = TrainedRanks(1, 1, 1, (0,) * layers).entries(maps, lambda _: "bfloat16")
    engines = EngineRanks(1, 1, (0,) * layers, first_rank=first_rank)
    targets = engines.entries(engine_maps(maps, num_key_value_heads=2), lambda _: "bfloat16")
    return ShardPlan(trained, targets, bucket_bytes=BUCKET)


def timed(action: Callable[[], object], repeats: int) -> float:
    """Median seconds, after one warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def receive(folder: str, plan_text: str, rounds: int, transport_name: str, max_changed: float) -> None:
    """The engine's process."""
    torch.set_num_threads(1)
    rank_plan, listener = RankPlan.from_text(plan_text), Listener(HOST)
    memory, mapped = Memory(rank_plan), dict[str, Tensor]()
    exchange = Exchange(rank_plan, max_changed=max_changed)
    Path(folder, "port").write_text(str(listener.port))
    Path(folder, "ready").touch()
    for index in range(rounds):
        messages = Path(folder, str(index))
        while not messages.exists():
            time.sleep(0.0005)
        transport = (
            FolderTransport(messages, 1, timeout_seconds=120, mapped=mapped)
            if transport_name == "shared memory"
            else listener.accept({0}, rank=1, round=str(index), token="", timeout_seconds=120)
        )
        exchange.run({}, memory, transport, version=index)
        Path(folder, f"done{index}").touch()


def apart(
    transport_name: str,
    parameters: dict[str, Tensor],
    maps: list[TensorMap],
    layers: int,
    repeats: int,
    floor: float,
    *,
    changed: float = 1.0,
) -> None:
    """Into another process; `changed`: share of the elements that differ from round to round, sent alone if few."""
    plan_apart = plan(maps, layers, 1)
    max_changed = 0.25 if changed < 1 else 0.0
    sender = Exchange(RankPlan.of(plan_apart, 0, {}), max_changed=max_changed)
    seconds, mapped = [], dict[str, Tensor]()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        rank_plan = RankPlan.of(plan_apart, 1, {}).to_text()
        arguments = (folder, rank_plan, repeats + 2, transport_name, max_changed)
        process = multiprocessing.get_context("spawn").Process(target=receive, args=arguments)
        process.start()
        while not Path(folder, "ready").exists():
            time.sleep(0.01)
        endpoint = Endpoint(HOST, int(Path(folder, "port").read_text()), "")
        for index in range(repeats + 2):
            if changed < 1:
                change(parameters, changed)
            messages = Path(folder, str(index))
            begun = time.perf_counter()
            messages.mkdir()
            transport = (
                FolderTransport(messages, 0, timeout_seconds=120, mapped=mapped)
                if transport_name == "shared memory"
                else connect({1: endpoint}, rank=0, round=str(index), timeout_seconds=120)
            )
            sender.run(parameters, None, transport, version=index)
            transport.close()
            while not Path(folder, f"done{index}").exists():
                time.sleep(0.0005)
            seconds.append(time.perf_counter() - begun)
        process.join()
        slots = sum(file.stat().st_size for file in Path(folder).glob("slot*"))
    # The first round makes the memory of messages, and with changes sends everything.
    show(transport_name + (f", {changed:.0%} changed" if changed < 1 else ""), statistics.median(seconds[2:]), floor)
    memory = f"; {slots / BUCKET:.1f} buckets of shared memory" if slots else ""
    print(f"{'':26} {sender.sent_bytes / 1e6:.0f} MB sent{memory}")


def change(parameters: dict[str, Tensor], share: float) -> None:
    """Flip the last bit of that share of the elements."""
    for tensor in parameters.values():
        bits = tensor.view(torch.int16).view(-1)
        where = torch.randint(len(bits), (max(1, int(share * len(bits))),))
        bits[where] ^= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = AutoConfig.for_model("qwen2", **SIZES, num_hidden_layers=arguments.layers, dtype="bfloat16")
    config.architectures = ["Qwen2ForCausalLM"]
    maps = family_of(config.to_dict()).tensor_maps(config.to_dict())
    parameters = {m.name: torch.randn(m.shard_shape(0, 1)).bfloat16() for m in maps}
    num_bytes = sum(tensor.nbytes for tensor in parameters.values())
    print(f"{num_bytes / 2e6:.0f}M parameters, {num_bytes / 1e6:.0f} MB, buckets of {BUCKET / 2**20:.0f} MiB")

    floor = memory_copy(parameters, arguments.repeats)
    show("memory copy", floor, floor)
    rank_plan = RankPlan.of(plan(maps, arguments.layers, 0), 0, {})
    exchange = Exchange(rank_plan)
    into_memory(exchange, Memory(rank_plan), parameters, arguments.repeats, floor)
    for transport_name, changed in (("shared memory", 1.0), ("network", 1.0), ("network", 0.02)):
        apart(transport_name, parameters, maps, arguments.layers, arguments.repeats, floor, changed=changed)
    into_vllm(config, parameters, maps, rank_plan, exchange, arguments.repeats, floor)


def memory_copy(parameters: dict[str, Tensor], repeats: int) -> float:
    """Seconds of copying every tensor to one that is there already."""
    copies = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    return timed(lambda: [copies[name].copy_(tensor) for name, tensor in parameters.items()], repeats)


def into_memory(exchange: Exchange, memory: Memory, parameters: dict[str, Tensor], repeats: int, floor: float) -> None:
    """The plan alone."""

    def shards() -> None:
        exchange.run(parameters, memory, NoPeers(), version=1)

    show("colocated, into memory", timed(shards, repeats), floor)
    show_peak(shards)


def into_vllm(
    config: object,
    parameters: dict[str, Tensor],
    maps: list[TensorMap],
    rank_plan: RankPlan,
    exchange: Exchange,
    repeats: int,
    floor: float,
) -> None:
    """The figures that need an engine."""
    from megatron_rl.rollout.engine import RolloutEngine
    from megatron_rl.weights.files.gather import assemble
    from tests.checkpoints import make_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)  # type: ignore[attr-defined]
        make_tokenizer().save_pretrained(folder)
        engine = RolloutEngine(
            model_path=folder,
            max_model_len=64,
            kv_cache_gigabytes=0.02,
            max_num_seqs=4,
            engine_args={"load_format": "dummy"},
        )

        def whole() -> Iterator[tuple[str, Tensor]]:
            for tensor_map in maps:
                yield from assemble(tensor_map, [parameters[tensor_map.name]])

        def shards() -> None:
            engine.load_shards(
                rank_plan.shard, lambda loader: exchange.run(parameters, loader, NoPeers(), version=1), version=1
            )

        show("colocated, into vLLM", timed(shards, repeats), floor)
        show_peak(shards)
        show("whole tensors", timed(lambda: engine.load_weights(whole(), version=2), repeats), floor)
        show_peak(lambda: engine.load_weights(whole(), version=2))
        engine.shutdown()


def show_peak(synchronize: Callable[[], object]) -> None:
    """Of one more synchronisation, when the earlier ones have made what stays."""
    with PeakMemory() as peak:
        synchronize()
    print(f"{'':26} {peak.bytes / 1e6:.0f} MB on top", flush=True)


def show(name: str, seconds: float, floor: float) -> None:
    print(f"{name:26} {seconds:7.3f} s {seconds / floor:6.2f} x", flush=True)


if __name__ == "__main__":
    main()
