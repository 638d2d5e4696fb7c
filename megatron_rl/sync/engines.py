"""Builds the engine of a rank from the configuration, and the engine of a task that only hosts one.

colocated       an engine inside the rank
disaggregated   a client of a server: a child of this rank, or, where the job has tasks for engines, of such a task
"""

import atexit
import hashlib
import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config.schema import Config, EnginePlacement, RewardModelKind, RolloutConfig
from megatron_rl.config.world import longest_sequence
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.device import HAS_CUDA
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.meeting import Meeting
from megatron_rl.placement.layout import Layout
from megatron_rl.placement.tasks import engine_devices
from megatron_rl.rollout.address import LOOPBACK, address_towards
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.hosting import FOLDER_VARIABLE, HostedServer, host_engine
from megatron_rl.rollout.remote import NoEngine, RemoteEngine, server_arguments
from megatron_rl.rollout.server import EngineServer, RewardServer
from megatron_rl.runs.directory import RunDirectory

Engine = RolloutEngine | RemoteEngine | NoEngine


def build_engine(
    config: RolloutConfig, *, model_path: str, dtype: str, max_model_len: int, seed: int, batch_invariant: bool
) -> RolloutEngine:
    """This rank's engine, or its part of one."""
    return RolloutEngine(
        model_path=model_path,
        dtype=dtype,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_gigabytes=config.kv_cache_gigabytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=config.enforce_eager,
        seed=seed,
        quantization=config.quantization,
        batch_invariant=batch_invariant,
        record_routes=config.record_routes,
        engine_args=config.engine_args,
    )


def place_engine(config: Config, layout: Layout, groups: Groups, meeting: Meeting) -> Engine:
    """This rank's engine, its part of one, or its client of one in other processes; collective over the world.

    Args:
        config: validated.
        layout, groups: of the ranks.
        meeting: where ranks wait for those whose engines have not started.
    """
    if config.rollout.placement is EnginePlacement.disaggregated:
        engine = _reach_engine(config, layout, groups, meeting)
        meeting.wait("start of the engines")
        return engine
    return build_engine(
        config.rollout if not HAS_CUDA else replace(config.rollout, engine_args=_not_read(config.rollout)),
        model_path=config.model.hf_path,
        dtype=config.model.params_dtype.value,
        max_model_len=_longest(config),
        seed=config.seed,
        batch_invariant=config.model.batch_invariant_mode,
    )


def _not_read(config: RolloutConfig) -> dict[str, Any]:
    """vLLM's arguments of an engine in the ranks, whose weights the first sync brings.

    Without them hundreds of ranks do not read a checkpoint twice, and formats that vLLM's own loader does not take
    start too.
    """
    return {"load_format": "dummy"} | config.engine_args


def keep_engine(config: Config, number: int, folder: Path, *, reached_from: str, first_slot: int) -> None:
    """Run in the task that hosts engine `number` of a job, until the ranks have ended.

    Args:
        config: validated.
        number: of the engine.
        folder: of this attempt, where the rank finds it.
        reached_from: the training ranks' first host; the server listens on the network that leads there.
        first_slot: number on its node of the first task that the engine has.

    Raises:
        EngineLost: its server does not start.
    """
    host = address_towards(reached_from)
    host_engine(number, folder, partial(_start_server, config, number, host=host, first_slot=first_slot))


def start_reward_server(config: Config) -> RewardServer:
    """The server of the learned reward, which ends with this process.

    Raises:
        EngineLost: it did not start.
    """
    model = config.rewards.model
    plain = replace(config.rollout, engine_args=model.engine_args)  # not those of the policy's engine
    dtype = config.model.params_dtype.value
    server = RewardServer(
        str(model.hf_path),
        server_arguments(plain, dtype=dtype, seed=config.seed, max_model_len=_longest(config)),
        per_token=model.kind is RewardModelKind.process,
        log=_run(config).logs_dir / "reward_engine.log",
        start_seconds=60 * config.rollout.start_minutes,
    )
    atexit.register(server.shutdown)
    return server


def _start_server(config: Config, number: int, *, host: str, first_slot: int) -> EngineServer:
    dtype, seed = config.model.params_dtype.value, config.seed
    return EngineServer(
        config.model.hf_path,
        server_arguments(config.rollout, dtype=dtype, seed=seed, max_model_len=_longest(config)),
        log=_run(config).logs_dir / f"engine_{number}.log",
        host=host,
        devices=engine_devices(_visible_devices(), first_slot, config.rollout.tensor_model_parallel_size),
        start_seconds=60 * config.rollout.start_minutes,
    )


def _reach_engine(config: Config, layout: Layout, groups: Groups, meeting: Meeting) -> RemoteEngine | NoEngine:
    """The engine that this rank drives, if it does; collective over the world."""
    hosts, rank = os.environ.get(FOLDER_VARIABLE), groups.world.rank()
    place: list[str | None] = [_message_folder(config, is_shared=hosts is not None) if rank == 0 else None]
    dist.broadcast_object_list(place, src=0, group=groups.world)
    messages, number = Path(str(place[0])), layout.engine(rank)
    if number is None:
        return NoEngine(messages)
    server: EngineServer | HostedServer
    if hosts is not None:
        limit = 60 * config.rollout.start_minutes
        server = HostedServer(number, Path(hosts), start_seconds=limit, on_progress=meeting.progressed)
    else:
        slot = layout.world_size + number * layout.engine_size
        server = _start_server(config, number, host=LOOPBACK, first_slot=slot)
        server.ready(meeting.progressed)
        atexit.register(server.end)
    tokenizer = load_tokenizer(config.model.hf_path)
    return RemoteEngine(
        server,
        folder=messages,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
        max_model_len=_longest(config),
        update_mode=config.rollout.in_flight.name,
        request_seconds=60 * config.rollout.request_minutes,
        stall_seconds=0.5 * 60 * config.parallel.distributed_timeout_minutes,
    )


def _message_folder(config: Config, *, is_shared: bool) -> str:
    """An empty folder through which weights pass, gone with this process.

    Args:
        is_shared: whether engines are on other nodes; it is then in the run's folder unless `sync.folder` says where.
    """
    run = _run(config).path
    memory = Path("/dev/shm")
    parent = Path(config.sync.folder) if config.sync.folder else memory if memory.is_dir() and not is_shared else run
    # Of this run, which one process at a time may have: what a killed one left behind goes, it may fill the memory.
    name = f"megatron_rl_{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]}_"
    for left_behind in parent.glob(f"{name}*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    made = tempfile.mkdtemp(prefix=name, dir=parent)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _visible_devices() -> list[str]:
    if not HAS_CUDA:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _longest(config: Config) -> int:
    """Longest prompt + completion of an engine, tokens."""
    return config.rollout.max_model_len or longest_sequence(config)


def _run(config: Config) -> RunDirectory:
    return RunDirectory(Path(config.output_dir) / config.name)
