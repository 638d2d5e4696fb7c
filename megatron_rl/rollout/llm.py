"""The vLLM side of the engine: its arguments, its executor, its request parameters.

Importing this module imports vLLM: 4 s, and side effects. It is first imported inside `isolation.isolated`.
"""

import difflib
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.executor import Executor
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from megatron_rl.config.schema import QuantizedFormat
from megatron_rl.rollout.sampling import RolloutError, Sampling
from megatron_rl.weights.quantized.formats import quantization_config

ON_CPU: bool = current_platform.is_cpu()

_CPU_KV_BLOCK_TOKENS = 32
"""Samples of a prompt share its full blocks of keys and values; vLLM's own 128 on CPUs is longer than most prompts."""
_PREFILL_TOKENS = 8192
"""Prompt tokens of one step, at least; further prompts wait for the next step."""


class GlooLauncherExecutor(ExecutorWithExternalLauncher):
    """Joins the ranks of a training job, as vLLM's external launcher does, with collectives over gloo on CPUs.

    vLLM would use shared memory, named after the end of the init method, which is the same for every externally
    launched job of a machine: a second job, or a first one started again after it was killed, finds the name taken and
    fails. Its collectives also spin without a limit when a rank has died, and add more than two ranks' values in an
    order that differs from rank to rank. Where the ranks disagree on the name vLLM falls back to torch.distributed, so
    here they do. The process group exists already: the init method serves no other purpose.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        init_method, rank, local_rank = super()._distributed_args()
        return f"{init_method}:rank{rank}", rank, local_rank


def start_engine(
    *,
    model_path: str,
    dtype: str,
    world_size: int,
    tensor_model_parallel_size: int,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_gigabytes: float,
    gpu_memory_utilization: float,
    enforce_eager: bool,
    seed: int,
    quantization: QuantizedFormat | None,
    prefix_cache: bool | None,
    engine_args: dict[str, Any],
) -> LLMEngine:
    """vLLM's engine in this process; parameters as of `RolloutEngine`. Collective over torch.distributed's world.

    `prefix_cache` None leaves that to vLLM and engine_args.

    Raises:
        RolloutError: an entry of engine_args that vLLM does not have, or that is decided here.
    """
    decided: dict[str, Any] = {
        "model": model_path,
        "dtype": dtype,
        "tensor_parallel_size": tensor_model_parallel_size,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "distributed_executor_backend": "external_launcher" if world_size > 1 else None,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "enforce_eager": enforce_eager,
        "seed": seed,
        # The distribution that was sampled from, which importance ratios need.
        "logprobs_mode": "processed_logprobs",
        # A prompt that is cut in two would draw its first noise twice; with a CPU's generator it ends the engine.
        "enable_chunked_prefill": False,
    }
    defaults: dict[str, Any] = {
        "max_num_batched_tokens": max(max_model_len, _PREFILL_TOKENS),
        "use_tqdm_on_load": False,
    }
    if prefix_cache is not None:
        decided["enable_prefix_caching"] = prefix_cache
    if quantization is not None:
        # There are no quantised weights yet: the engine starts with placeholders, which the first sync replaces.
        decided |= {
            "hf_overrides": {"quantization_config": quantization_config(quantization)},
            "load_format": "dummy",
            "quantization": None,
        }
    if ON_CPU:
        defaults |= {"kv_cache_memory_bytes": int(kv_cache_gigabytes * 1e9), "block_size": _CPU_KV_BLOCK_TOKENS}
    else:
        defaults |= {"gpu_memory_utilization": gpu_memory_utilization, "enable_sleep_mode": True}
    _check_engine_args(engine_args, decided)
    config = EngineArgs(**decided, **(defaults | engine_args)).create_engine_config()
    executor = GlooLauncherExecutor if ON_CPU and world_size > 1 else Executor.get_class(config)
    return LLMEngine(config, executor_class=executor, log_stats=False)


def _check_engine_args(engine_args: dict[str, Any], decided: dict[str, Any]) -> None:
    known = EngineArgs.__dataclass_fields__
    for name in engine_args:
        if name in decided:
            raise RolloutError(f"rollout.engine_args.{name} cannot be given: other keys of rollout decide it")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; the nearest is {nearest[0]}" if nearest else ""
            raise RolloutError(f"rollout.engine_args.{name}: vLLM has no such engine argument{hint}")


def generation_params(sampling: Sampling, *, max_tokens: int, seed: int) -> SamplingParams:
    """Parameters of one completion of at most max_tokens tokens."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=max_tokens,
        stop=list(sampling.stop),
        seed=seed,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        # Text is made once, at the end; only the search for stop strings needs it at every step.
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def scoring_params() -> SamplingParams:
    """Parameters of a request for the log-probs of its own prompt."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,  # the least that vLLM allows; the token is thrown away
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
