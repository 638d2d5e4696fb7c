"""A policy of two ranks and an engine in processes of its own: synchronised, attacked, killed, frozen, brought back.

One server serves all checks, because starting one takes most of the time. Rank 0 drives it.
"""

import http.client
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.config.schema import Dtype, ModelConfig, ParallelConfig, SyncConfig, SyncTransport, SyncVerify
from megatron_rl.rollout.sampling import Sampling
from tests.checkpoints import make_checkpoint
from tests.distributed.spawn import run_ranks
from tests.distributed.weight_sync_ranks import LOG_PROB_TOLERANCE, by_transformers, make_prompts
from tests.e2e.runs import Run, kill

ARGUMENTS = (
    "--dtype float32 --max-num-seqs 8 --enforce-eager --kv-cache-memory-bytes 20000000 --block-size 32 "
    "--max-model-len 64 --logprobs-mode processed_logprobs --enable-scale-out"
)


def in_rank(rank: int, folders: list[Path], shared: Path, transport: SyncTransport) -> dict[str, Any]:
    import megatron_rl.device  # noqa: F401  (prepares Megatron-Core before any of it is imported)
    from megatron_rl.engine.initialize import initialize
    from megatron_rl.engine.policy import Policy
    from megatron_rl.parallel.meeting import Meeting
    from megatron_rl.rollout.remote import NoEngine, RemoteEngine
    from megatron_rl.rollout.server import EngineServer
    from megatron_rl.sync.remote_sync import RemoteSync
    from megatron_rl.weights.files.local_shards import trained_ranks
    from megatron_rl.weights.plan.ranks import EngineRanks
    from megatron_rl.weights.plan.shard_plan import plan_sync

    parallel = ParallelConfig(tensor_model_parallel_size=2)
    policy = Policy(
        ModelConfig(hf_path=str(folders[0]), params_dtype=Dtype.float32), initialize(parallel, seed=1), parallel
    )
    trained = trained_ranks(policy.parameters, policy.groups)
    engines = EngineRanks(1, 1, (0, 0), first_rank=trained.world_size)
    plan = plan_sync(policy.hf, policy.maps, trained, engines, dtype="float32", bucket_bytes=50_000)
    engine = None
    if rank == 0:
        server = EngineServer(folders[0], ARGUMENTS.split(), log=shared / "engine.log")
        server.ready()
        engine = RemoteEngine(server, folder=shared, decode=str, max_model_len=64)
    config = SyncConfig(verify=SyncVerify.full, timeout_seconds=20, transport=transport, delta=0.3)
    meeting = Meeting.of_world("test", limit_seconds=120.0)
    sync = RemoteSync(policy, plan, engines, config, engine=engine or NoEngine(shared), number=0, meeting=meeting)
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
        if engine is not None:
            out["progress"] = progress_of(engine)
            out["frozen"] = frozen_while_it_generates(engine)
        in_the_middle(engine, 2, lambda _: os.killpg(engine.server.process.pid, signal.SIGKILL))
        synced(folders[1], 3)
        in_the_middle(engine, 2, lambda _: os.killpg(engine.server.process.pid, signal.SIGSTOP))
        synced(folders[2], 4)
        in_the_middle(engine, 1, flip_a_bit)
        synced(folders[1], 5)
        everything = sync.sent_bytes
        synced(folders[3], 6)
        out["share_sent"] = sync.sent_bytes / everything
    finally:
        if engine is not None:
            engine.shutdown()
    return out


def progress_of(engine: Any) -> list[int]:
    """What a generation tells on its way, looked at often."""
    from megatron_rl.rollout import remote

    told: list[int] = []
    before, remote._LOOK_SECONDS = remote._LOOK_SECONDS, 0.02
    sampling = Sampling(temperature=1.0, max_response_tokens=40)
    engine.generate(make_prompts(), num_samples=4, sampling=sampling, seeds=[0, 0], on_progress=told.append)
    remote._LOOK_SECONDS = before
    return told


def frozen_while_it_generates(engine: Any) -> tuple[str, str]:
    """Stop the whole server, then its core alone, and let each go on when that has been noticed; what was said."""
    from megatron_rl.rollout import remote
    from megatron_rl.rollout.address import EngineLost

    process = psutil.Process(engine.server.process.pid)
    core = next(child for child in process.children(recursive=True) if "EngineCore" in child.name())
    sampling = Sampling(temperature=1.0, max_response_tokens=40)
    before, remote._LOOK_SECONDS = (remote._LOOK_SECONDS, engine._stall_seconds), 0.5
    engine._stall_seconds = 2.0
    said = []
    for frozen in (process, core):
        frozen.suspend()
        with pytest.raises(EngineLost) as lost:
            engine.generate(make_prompts(), num_samples=1, sampling=sampling, seeds=[0, 0])
        frozen.resume()
        said.append(str(lost.value))
    assert not engine.answers()  # until it is started again, which its keeper would do now
    engine._is_stalled = False
    remote._LOOK_SECONDS, engine._stall_seconds = before
    return said[0], said[1]


def refusal(engine: Any, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", engine.server.address.port, timeout=10)
    connection.request("GET", path, headers={"Authorization": "Bearer guessed"})
    return connection.getresponse().status


def in_the_middle(engine: Any, bucket: int, action: Callable[[dict[int, torch.Tensor]], None]) -> None:
    """In the next synchronisation: before that bucket is sent, when at least the first has been loaded."""
    if engine is None:
        return
    from megatron_rl.weights.transport.folder import FolderTransport
    from megatron_rl.weights.transport.sockets import SocketTransport

    for transport in (FolderTransport, SocketTransport):
        original = transport.post

        def post(self: Any, index: int, outgoing: Any, incoming: Any, original: Any = original) -> Any:
            if index == bucket:
                type(self).post = original
                action(outgoing)
            return original(self, index, outgoing, incoming)

        transport.post = post  # type: ignore[method-assign]


def nearly(folder: Path, output: Path) -> Path:
    """The checkpoint with a hundredth of its elements changed."""
    shutil.copytree(folder, output)
    tensors = load_file(output / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        tensor[torch.rand(tensor.shape, generator=generator) < 0.01] += 0.5
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def flip_a_bit(outgoing: dict[int, torch.Tensor]) -> None:
    for message in outgoing.values():
        message[100] ^= 4


def check(tmp_path: Path, transport: SyncTransport) -> list[int]:
    folders = [make_checkpoint(tmp_path / str(seed), "llama", seed) for seed in (1, 2, 3)]
    folders.append(nearly(folders[1], tmp_path / "nearly"))
    shared = Path("/dev/shm") / f"test_remote_engine_{os.getpid()}"
    shared.mkdir()
    try:
        driver, _ = run_ranks(in_rank, 2, folders, shared, transport, timeout_s=500)
    finally:
        shutil.rmtree(shared)
    assert driver["refusals"] == [401, 401, 401]
    assert sum(driver["progress"]) == 8
    assert driver["progress"].count(0) >= 2  # tokens of completions that were not finished
    server, core = driver["frozen"]
    assert "GET /metrics: no answer within 0.5 s" in server
    assert re.search(r"no token in \d s, with 2 requests unfinished$", core)
    # A hundredth of the elements, each with a position as long as itself; and the proofs of many small messages.
    assert driver["share_sent"] < 0.1
    for folder, version, completions, log_probs in driver["states"]:
        expected = by_transformers(Path(folder))
        assert [c.token_ids for c in completions] == expected.completions
        assert {c.weight_version for c in completions} == {version}
        for ours, theirs in zip(log_probs, expected.log_probs, strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=0, atol=LOG_PROB_TOLERANCE)
    return [version for _, version, _, _ in driver["states"]]


@pytest.mark.slow
@pytest.mark.parametrize("transport", [SyncTransport.folder, SyncTransport.network])
def test_a_remote_engine_follows_the_policy_through_death_freeze_and_damage(
    transport: SyncTransport, tmp_path: Path
) -> None:
    assert check(tmp_path, transport) == [1, 2, 3, 4, 5, 6]


APART = {"placement": "disaggregated", "num_engines": 1}
SYNC = {"verify": "full", "verify_tolerance": 1e-4, "timeout_seconds": 60}


def check_rows(run: Run) -> None:
    trained = [row for row in run.rows if "sync/version" in row]
    assert [row["sync/version"] for row in trained] == [row["step"] for row in trained]
    assert len(trained) > 2
    assert all(row["staleness/max"] == 0 for row in trained)
    # As between a colocated engine and the policy: both round differently.
    assert all(row["mismatch/log_prob_abs_diff_max"] < 1e-4 for row in trained)


def servers_of(run: Run) -> list[psutil.Process]:
    """vLLM's servers that were started in the run's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = process.info["cmdline"] or []
        if "vllm.entrypoints.openai.api_server" in command and process.info["cwd"] == str(run.folder):
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["folder", "network"])
def test_a_run_with_an_engine_of_its_own(transport: str, tmp_path: Path) -> None:
    """Two ranks, one of which drives the server; every step's log-probs and parameters are verified."""
    sync = SYNC | {"transport": transport, "delta": 0.25 if transport == "network" else 0.0}
    check_rows(Run(tmp_path, rollout=APART, sync=sync).succeed())


@pytest.mark.slow
def test_a_run_outlives_its_engine(tmp_path: Path) -> None:
    """The server is killed twice: while the policy trains or generates, and in the middle of a synchronisation."""
    run = Run(tmp_path, rollout=APART, sync=SYNC | {"transport": "network", "delta": 0.25}, train={"num_steps": 8})
    process = run.start()
    try:
        for rows in (2, 5):
            wait_for(lambda rows=rows: run.directory.metrics_file.exists() and len(run.rows) >= rows, process)
            (server,) = servers_of(run)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=30)
        out, err = process.communicate(timeout=400)
    finally:
        kill(process)
    assert process.returncode == 0, err[-4000:]
    assert out.count("an engine had died; started again") == 2
    check_rows(run)
    assert servers_of(run) == []


@pytest.mark.slow
def test_a_trainer_that_is_killed_in_the_middle_of_a_synchronisation(tmp_path: Path) -> None:
    """The run ends with an error and leaves no server; the same command goes on with a new one."""
    run = Run(tmp_path, rollout=APART, sync=SYNC)
    process = run.start_and_stop_inside("weights/transport/exchange.py:_run", after_rows=2)
    try:
        rank = next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "0")
        assert len(servers_of(run)) == 1
        rank.kill()
        _, err = process.communicate(timeout=120)
    finally:
        kill(process)
    assert process.returncode != 0
    assert "rank 0" in err
    wait_for(lambda: servers_of(run) == [])
    check_rows(run.succeed())


def wait_for(what: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    deadline = time.monotonic() + 400
    while not what():
        assert process is None or process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
