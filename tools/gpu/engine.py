"""The GPU qualification with an engine beside the policy: weight synchronisation, and how their numbers differ."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tools.gpu.measure import DEVICE, Figures, model_folder, peak_bytes, seconds_of, world


def _engine_and_policy(folder: Path, shape: str, *, batch_invariant: bool = False) -> tuple[Any, Any]:
    from megatron_rl.config.schema import ModelConfig, ParallelConfig
    from megatron_rl.engine.policy import Policy
    from megatron_rl.rollout.engine import RolloutEngine
    from tests.checkpoints import make_tokenizer

    groups = world()
    path = model_folder(folder, shape)
    make_tokenizer().save_pretrained(path)
    settings = ModelConfig(hf_path=str(path), load_weights=False, batch_invariant_mode=batch_invariant)
    policy = Policy(settings, groups, ParallelConfig(), trained=False)
    engine = RolloutEngine(
        model_path=path,
        max_model_len=4096,
        gpu_memory_utilization=0.4,
        batch_invariant=batch_invariant,
        engine_args={"load_format": "dummy"},
    )
    return policy, engine


def weight_sync(quick: bool) -> Figures:
    """A sync inside the process, as a run makes it, against a copy of as many bytes on the device."""
    from datetime import timedelta

    from megatron_rl.device import this_device
    from megatron_rl.weights.files.local_shards import trained_ranks
    from megatron_rl.weights.plan.rank_plan import RankPlan
    from megatron_rl.weights.plan.ranks import EngineRanks
    from megatron_rl.weights.plan.shard_plan import plan_sync
    from megatron_rl.weights.transport.exchange import Exchange
    from megatron_rl.weights.transport.process_group import ProcessGroupTransport

    with tempfile.TemporaryDirectory() as folder:
        policy, engine = _engine_and_policy(Path(folder), "1B")
        num_bytes = sum(p.numel() * p.element_size() for p in policy.parameters.values())
        trained = trained_ranks(policy.parameters, policy.groups)
        engines = EngineRanks(
            num_engines=1, tensor=1, stage_of_layer=(0,) * len(trained.stage_of_layer), first_rank=0, num_experts=0
        )
        dtype = str(policy.dtype).removeprefix("torch.")
        plan = plan_sync(policy.hf, policy.maps, trained, engines, dtype=dtype, bucket_bytes=256 << 20)
        rank_plan = RankPlan.of(plan, 0, engines.expert_rows(0))
        transport = ProcessGroupTransport(policy.groups.world, timeout=timedelta(seconds=60), device=this_device())
        exchange = Exchange(rank_plan)
        version = 0

        def shards() -> None:
            nonlocal version
            version += 1
            feed = lambda loader: exchange.run(policy.parameters, loader, transport, version=version)  # noqa: E731
            engine.load_shards(rank_plan.shard, feed, version=version)

        def whole() -> None:
            engine.load_weights(policy.hf_tensors(bucket_bytes=256 << 20), version=version)

        repetitions = 2 if quick else 5
        seconds, of_whole, extra = seconds_of(shards, repetitions), seconds_of(whole, repetitions), peak_bytes(shards)
        source = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        copied = seconds_of(lambda: target.copy_(source))
    return {
        "GB": num_bytes / 1e9,
        "sync_s": seconds,
        "sync_GB_per_s": num_bytes / seconds / 1e9,
        "sync_peak_MiB": extra / 2**20,
        "whole_tensors_s": of_whole,
        "device_copy_GB_per_s": num_bytes / copied / 1e9,
        "sync_over_copy": seconds / copied,
    }


def rollout_and_difference(batch_invariant: bool, quick: bool) -> Figures:
    """Time of generating and of log-probs, and how far the two sides' log-probs are apart."""
    from megatron_rl.data.packing import pack, unpack
    from megatron_rl.data.samples import Prompt, TrainingSequence
    from megatron_rl.engine.step import forward_log_probs
    from megatron_rl.rollout.sampling import Sampling

    with tempfile.TemporaryDirectory() as folder:
        policy, engine = _engine_and_policy(Path(folder), "1B", batch_invariant=batch_invariant)
        engine.load_weights(policy.hf_tensors(bucket_bytes=256 << 20), version=1)
        prompts = [Prompt(i, tuple(range(3, 35 + i)), "", None, "") for i in range(16 if quick else 64)]
        sampling = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=128)
        start = time.perf_counter()
        completions = engine.generate(prompts, num_samples=1, sampling=sampling, seeds=range(len(prompts)))
        generate_s = time.perf_counter() - start
    sequences, of_engine = [], []
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        ids = torch.tensor([*prompt.token_ids, *completion.token_ids]).numpy()
        sequences.append(TrainingSequence(ids, torch.ones(len(ids) - 1).numpy()))
        of_engine.append(torch.tensor(completion.log_probs))
    micro_batch = pack(sequences, range(len(sequences)), pad_to_multiple=16)
    start = time.perf_counter()
    ((log_probs, _),) = forward_log_probs(policy, [micro_batch])
    seconds = time.perf_counter() - start
    parts = zip(unpack(log_probs, micro_batch), of_engine, strict=True)
    difference = torch.cat([ours[-len(theirs) :] - theirs for ours, theirs in parts]).abs()
    return {
        "generate_s": generate_s,
        "log_probs_s": seconds,
        "log_prob_abs_diff_mean": float(difference.mean()),
        "log_prob_abs_diff_max": float(difference.max()),
        "log_probs_equal_fraction": float((difference == 0).float().mean()),
    }
