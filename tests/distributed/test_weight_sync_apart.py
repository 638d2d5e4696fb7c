"""Real policies into engines in processes of their own: bit for bit, and as transformers do.

Servers start once for a family, as one of two ranks, which gets its weights through shared memory, and as two of one
rank, over TCP; every layout of the policy synchronises with all of them, twice with other weights.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from megatron_rl.config.schema import RolloutConfig, SyncTransport
from megatron_rl.rollout import server
from megatron_rl.rollout.remote import server_arguments
from megatron_rl.rollout.server import EngineServer
from tests.distributed.recording_extension import FOLDER_VARIABLE
from tests.distributed.spawn import run_ranks
from tests.distributed.test_weight_sync import WITH_EXPERTS
from tests.distributed.weight_sync_ranks import (
    ENGINE_ARGS,
    SHAPES,
    Apart,
    Checkpoints,
    by_transformers,
    check_outputs,
    differences,
    sync_apart_in_rank,
)

RANKS = {"tp2": 2, "pp2": 2, "ep2": 2, "tp2_pp2": 4}


@contextmanager
def started(
    checkpoints: Checkpoints, sizes: list[int], root: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[EngineServer]]:
    """Servers of the first checkpoint, one of each size, that record what they are filled with."""
    monkeypatch.setattr(server, "_WORKER_EXTENSION", "tests.distributed.recording_extension.RecordingExtension")
    with ExitStack() as stack:
        servers = []
        for number, size in enumerate(sizes):
            rollout = RolloutConfig(
                tensor_model_parallel_size=size,
                max_num_seqs=4,
                kv_cache_gigabytes=0.02,
                engine_args=ENGINE_ARGS.get(checkpoints.family, {}),
            )
            (root / f"recorded_{number}").mkdir()
            monkeypatch.setenv(FOLDER_VARIABLE, str(root / f"recorded_{number}"))
            arguments = server_arguments(rollout, dtype="float32", seed=0, max_model_len=64)
            servers.append(EngineServer(checkpoints.first, arguments, log=root / f"engine_{number}.log"))
            stack.callback(servers[-1].end)
        for one in servers:
            one.ready()
        yield servers


def check(family: str, layouts: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints.make(root, family)
    # The last is what the engines hold at the end of a layout, and can be read back.
    expected = {folder: by_transformers(folder) for folder in checkpoints.others}
    with started(checkpoints, [2, 1, 1], root, monkeypatch) as servers:
        addresses = [one.address for one in servers]
        for layout in layouts:
            (root / layout).mkdir()
            engines = [
                Apart(addresses[:1], 2, SyncTransport.folder, root / layout),
                Apart(addresses[1:], 1, SyncTransport.network, root / layout),
            ]
            ranks = run_ranks(
                sync_apart_in_rank,
                RANKS[layout],
                layout,
                engines,
                checkpoints,
                timeout_s=300,
            )
            for number, apart in enumerate(engines):
                for rank in range(len(apart.addresses)):
                    for version, folder in enumerate(checkpoints.others, 1):
                        check_outputs(ranks[rank][number][version - 1], expected[folder], version)
            check_parameters(checkpoints, RANKS[layout], root)


def check_parameters(checkpoints: Checkpoints, num_trained: int, root: Path) -> None:
    last = checkpoints.others[-1]
    places = [(0, 2, 0), (0, 2, 1), (1, 1, 0), (2, 1, 0)]  # server, size of its engine, rank in it
    for number, size, rank in places:
        in_plan = num_trained + (number - 1 if number else rank)
        file = root / f"recorded_{number}" / f"rank{in_plan}.pt"
        held = {name: x.numpy() for name, x in torch.load(file).items()}
        file.unlink()
        assert dict(differences(held, checkpoints.expected_shards(last, size)[rank])) == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_every_layout_into_engines_of_their_own(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = ["tp2", "pp2", "tp2_pp2"] + (["ep2"] if family in WITH_EXPERTS else [])
    check(family, layouts, tmp_path, monkeypatch)
