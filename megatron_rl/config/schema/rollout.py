"""Generation, and the weights that engines get."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from megatron_rl.config.schema.model import QuantizedFormat


class EnginePlacement(Enum):
    """Where the engines run: inside the training ranks, or in processes of their own."""

    colocated = "colocated"
    disaggregated = "disaggregated"


class InFlight(Enum):
    """What becomes of requests that run while weights change: see `rollout/remote.py`."""

    keep = "keep"
    wait = "wait"
    abort = "abort"


class SyncVerify(Enum):
    """How much of every weight synchronisation is proven; see `sync/weight_sync.py`."""

    off = "off"
    sample = "sample"
    full = "full"


class SyncTransport(Enum):
    """How weights travel to engines in processes of their own."""

    auto = "auto"
    folder = "folder"
    network = "network"
    process_group = "process_group"


@dataclass
class SamplingConfig:
    """How completions are sampled in training rollouts."""

    temperature: float = 1.0
    """Divides the logits. Rollout and training log-probs both use it."""
    max_response_tokens: int = 256
    """Completions are cut here, with finish reason 'length'."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion, besides the end-of-sequence token."""


@dataclass
class RolloutConfig:
    """Generation with vLLM."""

    placement: EnginePlacement = EnginePlacement.colocated
    """Engines inside the training ranks, or vLLM servers in processes of their own: on this machine, or in the last
    tasks of a Slurm job, tensor_model_parallel_size of them for each."""
    num_engines: int = 1
    """With placement disaggregated: engines, each driven by one of the first training ranks."""
    in_flight: InFlight = InFlight.keep
    """With placement disaggregated: requests that run while weights change go on with the new ones (keep), end first
    (wait), or are ended (abort)."""

    num_prompts_per_step: int = 16
    """Prompts of one training step."""
    num_samples_per_prompt: int = 8
    """Completions of each prompt: the size of a group."""
    tensor_model_parallel_size: int = 1
    """Ranks that share one engine; the training ranks are divided into engines of this size."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are sampled."""
    max_model_len: int | None = None
    """Longest prompt + completion of the engine; null: data.max_prompt_tokens + sampling.max_response_tokens."""
    max_num_seqs: int = 256
    """Sequences that an engine decodes at once."""
    kv_cache_gigabytes: float = 0.25
    """Key-value cache of each rank on a CPU."""
    gpu_memory_utilization: float = 0.5
    """Part of a GPU's memory for the engine."""
    offload_training: bool = False
    """While engines inside the ranks generate, gradients give up their memory and the optimizer's state is on the host;
    see `engine/optimizer.py`."""
    enforce_eager: bool = True
    """False lets vLLM compile and capture graphs: slower start, faster decoding."""
    quantization: QuantizedFormat | None = None
    """fp8 or int8: engines hold quantised weights and quantise their activations. Each sync rounds the policy's weights
    once. mismatch/* tells what it costs; with the same model.quantization, nothing."""
    record_routes: bool = False
    """Record the experts that the engine chose for each token, and send it there again in every pass over the policy.
    Needs model.moe_routing_replay, colocated engines with enforce_eager, and does without the cache of prefixes."""
    start_minutes: float = 10.0
    """Limit of the start of an engine with processes of its own."""
    request_minutes: float = 60.0
    """Limit of one request to such an engine. One that generates nothing is lost after half of
    parallel.distributed_timeout_minutes, one that does not answer after half a minute."""
    max_mismatch: float | None = None
    """Stop the run when a step's mismatch/log_prob_abs_diff_mean, nats, is above this. null: the first step
    alone, at 0.01 in float32, 0.2 in bfloat16, 0.5 with quantization."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, by its own names."""


@dataclass
class SyncConfig:
    """Sending the policy's weights to the engines."""

    bucket_megabytes: float = 256.0
    """Weights travel in buckets of at most this size (a single larger tensor travels alone)."""
    transport: SyncTransport = SyncTransport.auto
    """How disaggregated engines get their weights: through a folder, over the network by TCP, or in a process group of
    all ranks and engines, which is NCCL's between GPUs and else gloo's. auto: see `sync/transports.py`."""
    folder: str | None = None
    """Folder of that transport; null: this machine's shared memory, or the run's folder if a Slurm job has tasks for
    engines."""
    delta: float = 0.0
    """Disaggregated engines are sent only the elements that have changed where these are at most this share of a
    message, which takes both sides memory for a copy of what is sent; 0: always all elements, and no copy."""
    timeout_seconds: float = 240.0
    """Limit of any wait for a peer's weights."""
    verify: SyncVerify = SyncVerify.off
    """After each sync compare the engine's log-probs on probe prompts with the policy's, and on the way checksums of
    its parameters: of every sixteenth, others each time (sample), or of all (full). A difference stops the run."""
    verify_tolerance: float = 1e-3
    """Largest log-prob difference that `verify` accepts, nats; for bfloat16 about 0.1."""
