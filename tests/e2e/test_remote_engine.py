"""A policy of two ranks and an engine in processes of its own: synchronised, attacked, killed, frozen, brought back.

One server serves all checks, because starting one takes most of the time. Rank 0 drives it.
"""

import http.client
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig, SyncConfig, SyncVerify
from megatron_rl.rollout.sampling import Sampling
from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks
from tests.distributed.weight_sync_ranks import LOG_PROB_TOLERANCE, by_transformers, make_prompts
from tests.e2e.runs import Run

ARGUMENTS = (
    "--dtype float32 --max-num-seqs 8 --enforce-eager --kv-cache-memory-bytes 20000000 --block-size 32 "
    "--max-model-len 64 --logprobs-mode processed_logprobs --enable-scale-out"
)


def in_rank(rank: int, folders: list[Path], shared: Path, faults: bool) -> dict[str, Any]:
    import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy
    from megatron_rl.rollout.remote import NoEngine, RemoteEngine
    from megatron_rl.rollout.server import EngineServer
    from megatron_rl.trainer.remote_sync import RemoteSync
    from megatron_rl.trainer.sync import plan_sync, trained_ranks
    from megatron_rl.weights.holders import EngineRanks

    parallel = ParallelConfig(tensor_model_parallel_size=2)
    policy = Policy(
        ModelConfig(hf_path=str(folders[0]), params_dtype=Dtype.float32), initialize(parallel, seed=1), parallel
    )
    trained = trained_ranks(policy)
    engines = EngineRanks(1, 1, (0, 0), first_rank=trained.world_size)
    plan = plan_sync(policy, trained, engines, bucket_bytes=50_000)
    engine = None
    if rank == 0:
        server = EngineServer(folders[0], ARGUMENTS.split(), log=shared / "engine.log")
        server.ready()
        engine = RemoteEngine(server, folder=shared, decode=str, max_model_len=64)
    config = SyncConfig(verify=SyncVerify.full, timeout_seconds=20)
    sync = RemoteSync(policy, plan, engines, config, engine=engine or NoEngine(shared), number=0)
    out: dict[str, Any] = {"states": []}

    def synced(folder: Path, version: int) -> None:
        policy.load_hf_weights(folder)
        sync(version)
        if engine is not None:
            prompts = make_prompts()
            sampling = Sampling(temperature=0.0, max_response_tokens=8)
            groups = engine.generate(prompts, num_samples=1, sampling=sampling, seeds=[0, 0])
            log_probs = engine.log_probs([prompt.token_ids for prompt in prompts])
            out["states"].append((str(folder), version, [group[0] for group in groups], log_probs))

    try:
        synced(folders[1], 1)
        synced(folders[2], 2)
        if engine is not None:
            out["refusals"] = [refusal(engine, path) for path in ("/health", "/is_paused", "/inference/v1/generate")]
        if faults:
            attack(engine, lambda pid: os.killpg(pid, signal.SIGKILL))
            synced(folders[1], 3)
            attack(engine, lambda pid: os.killpg(pid, signal.SIGSTOP))
            synced(folders[2], 4)
            flip_a_bit_of_the_next_message(engine)
            synced(folders[1], 5)
    finally:
        if engine is not None:
            engine.shutdown()
    return out


def refusal(engine: Any, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", engine.server.address.port, timeout=10)
    connection.request("GET", path, headers={"Authorization": "Bearer guessed"})
    return connection.getresponse().status


def attack(engine: Any, how: Any) -> None:
    """In the middle of the next synchronisation: before the third bucket is sent, when the first has been loaded."""
    if engine is None:
        return
    from megatron_rl.weights.folder import FolderTransport

    original = FolderTransport.post

    def post(transport: FolderTransport, bucket: int, *messages: Any) -> Any:
        if bucket == 2:
            FolderTransport.post = original  # type: ignore[method-assign]
            how(engine.server.process.pid)
        return original(transport, bucket, *messages)

    FolderTransport.post = post  # type: ignore[method-assign]


def flip_a_bit_of_the_next_message(engine: Any) -> None:
    if engine is None:
        return
    original = engine.load

    def load(messages: Path, **arguments: Any) -> None:
        engine.load = original
        while not (messages / "1.0.2").exists():
            time.sleep(0.0005)
        with (messages.parent / "slot1.0.2").open("r+b") as stream:
            stream.seek(100)
            byte = stream.read(1)[0]
            stream.seek(100)
            stream.write(bytes([byte ^ 4]))
        original(messages, **arguments)

    engine.load = load


def check(tmp_path: Path, *, faults: bool) -> list[int]:
    folders = [make_checkpoint(tmp_path / str(seed), "llama", seed) for seed in (1, 2, 3)]
    shared = Path("/dev/shm") / f"test_remote_engine_{os.getpid()}"
    shared.mkdir()
    try:
        driver, _ = run_ranks(in_rank, 2, folders, shared, faults, timeout_s=400)
    finally:
        shutil.rmtree(shared)
    assert driver["refusals"] == [401, 401, 401]
    for folder, version, completions, log_probs in driver["states"]:
        expected = by_transformers(Path(folder))
        assert [c.token_ids for c in completions] == expected.completions
        assert {c.weight_version for c in completions} == {version}
        for ours, theirs in zip(log_probs, expected.log_probs, strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0, atol=LOG_PROB_TOLERANCE)
    return [version for _, version, _, _ in driver["states"]]


@pytest.mark.slow
def test_a_remote_engine_follows_the_policy_through_death_freeze_and_damage(tmp_path: Path) -> None:
    assert check(tmp_path, faults=True) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_run_with_an_engine_of_its_own(tmp_path: Path) -> None:
    """Two ranks, one of which drives the server; every step's log-probs and parameters are verified."""
    run = Run(tmp_path, rollout={"placement": "disaggregated", "num_engines": 1}).succeed()
    trained = [row for row in run.rows if "sync/version" in row]
    assert [row["sync/version"] for row in trained] == [row["step"] for row in trained]
    assert len(trained) > 2
    assert all(row["staleness/max"] == 0 for row in trained)
    # As between a colocated engine and the policy: both round differently.
    assert all(row["mismatch/log_prob_abs_diff_max"] < 1e-4 for row in trained)
