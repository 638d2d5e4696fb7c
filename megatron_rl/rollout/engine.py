"""Rollouts: one vLLM engine inside the training processes.

The ranks of the training world are divided into engines of `tensor_model_parallel_size` consecutive ranks. All ranks
of an engine call every method with the same arguments in the same order, because each runs its own copy of vLLM's
scheduler and the copies must decide alike; different engines never wait for each other. The caller's torch.distributed
world is used and outlives the engine.

Token ids go in and come out. A completion is a function of the weights, the prompt, its seed and the sample's number:
its noise depends neither on the other requests of the batch nor on the engine or its size. (Logits do, in their last
bits, so two tokens of almost equal probability may still change places.)
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.schema import QuantizedFormat
from megatron_rl.data.chat import load_tokenizer
from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.models.batch_invariance import make_room_for_vllm
from megatron_rl.models.capabilities import capabilities
from megatron_rl.rollout.isolation import isolated, random_states_kept
from megatron_rl.rollout.sampling import RolloutError, Sampling, sample_seed
from megatron_rl.weights.plan.rank_plan import EngineShard
from megatron_rl.weights.transport.exchange import Loader, OnFilled


class RolloutEngine:
    """A vLLM engine of this rank, or this rank's part of one. One at a time in a process: vLLM's groups are global."""

    _alive: ClassVar[bool] = False

    def __init__(
        self,
        *,
        model_path: str | Path,
        dtype: str = "bfloat16",
        tensor_model_parallel_size: int = 1,
        max_model_len: int,
        max_num_seqs: int = 256,
        kv_cache_gigabytes: float = 0.25,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = True,
        seed: int = 0,
        quantization: QuantizedFormat | None = None,
        batch_invariant: bool = False,
        record_routes: bool = False,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        """Start the engine with the weights of `model_path`, as version 0. Collective over torch.distributed's world.

        Args:
            model_path: folder of a Hugging Face checkpoint with tokenizer.
            dtype: 'float32' or 'bfloat16', of weights, activations and cache.
            tensor_model_parallel_size: ranks that share the engine; divides the world.
            max_model_len: longest prompt + completion, tokens.
            max_num_seqs: sequences decoded at once.
            kv_cache_gigabytes: keys and values of this rank, on a CPU.
            gpu_memory_utilization: part of a GPU's memory for the engine, weights included.
            enforce_eager: False lets vLLM compile and capture graphs.
            seed: of vLLM itself; samples have their own.
            quantization: the engine's layers are quantised, and it has no weights until `load_weights` brings those of
                `weights.quantization`. None: as the checkpoint is.
            batch_invariant: vLLM's kernels whose results do not depend on the batch, on a GPU; for the whole process.
            record_routes: completions carry the experts that each token went to; without a cache of prefixes.
            engine_args: further arguments of vLLM's EngineArgs.

        Raises:
            RolloutError: a size that does not divide the world; an engine argument that is unknown or decided here.
        """
        self.max_model_len = max_model_len
        self.weight_version = 0
        """Version of the weights, stamped on every completion."""
        self._owns_world = not dist.is_initialized()
        self._asleep = self._has_cache_to_map = False
        world_size = 1 if self._owns_world else dist.get_world_size()
        if world_size % tensor_model_parallel_size:
            size = f"rollout.tensor_model_parallel_size is {tensor_model_parallel_size}"
            raise RolloutError(f"{size}; it must divide the {world_size} ranks")
        if RolloutEngine._alive:
            raise RuntimeError("this process has a rollout engine; shut it down before starting another")
        if batch_invariant:
            os.environ["VLLM_BATCH_INVARIANT"] = "1"
            make_room_for_vllm(capabilities().compute_capability)
        if record_routes:
            # The second model runner, vLLM's default on GPUs, has not the forward pass that the recorder wraps.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        with isolated():
            from megatron_rl.rollout import llm

            self._llm = llm
            self._engine = llm.start_engine(
                model_path=str(model_path),
                dtype=dtype,
                world_size=world_size,
                tensor_model_parallel_size=tensor_model_parallel_size,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_gigabytes=kv_cache_gigabytes,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
                seed=seed,
                quantization=quantization,
                prefix_cache=False if record_routes else None,
                engine_args=engine_args or {},
            )
            self._recorder = self._recorder_of_routes() if record_routes else None
        RolloutEngine._alive = True
        self._tokenizer = load_tokenizer(model_path)  # vLLM's may be of another class than tokenizer.json's
        _keep_process_groups(self._engine.engine_core)
        # On a CPU vLLM compiles a function of its sampler (2 s, and a C++ compiler) even where it is told to be eager.
        self._interpreted = llm.ON_CPU and enforce_eager

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Complete every prompt `num_samples` times.

        Args:
            prompts: their token ids are the input; text is not read.
            num_samples: completions of each prompt.
            sampling: how tokens are drawn.
            seeds: one per prompt. Sample i of a prompt depends on its seed and i alone; equal seeds give equal noise.
            on_progress: called after every step of the engine, with the number of completions that it finished.

        Returns:
            [num_prompts][num_samples] completions. log_probs are those of the distribution sampled from: after
            temperature and top_p; at temperature 0, of the undivided logits. A completion ends early, with finish
            reason 'length', where prompt and response reach max_model_len.

        Raises:
            RolloutError: a prompt that leaves no room for a response, or has no tokens.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} seeds")
        for prompt in prompts:
            if not 0 < len(prompt.token_ids) < self.max_model_len:
                raise RolloutError(
                    f"prompt {prompt.prompt_id} ({prompt.source}) has {len(prompt.token_ids)} tokens; "
                    f"rollout.max_model_len allows 1 to {self.max_model_len - 1}"
                )
        requests = [
            (prompt.token_ids, self._llm.generation_params(sampling, max_tokens=room, seed=sample_seed(seed, sample)))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for room in [min(sampling.max_response_tokens, self.max_model_len - len(prompt.token_ids))]
            for sample in range(num_samples)
        ]
        completions = [
            self._completion(output.outputs[0], request, len(token_ids))
            for request, (output, (token_ids, _)) in enumerate(
                zip(self._run(requests, on_progress), requests, strict=True)
            )
        ]
        self._forget_routes()
        return [completions[start : start + num_samples] for start in range(0, len(completions), num_samples)]

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability, nats, at temperature 1, of every token but the first given those before it.

        Entry t of a sequence's result belongs to its token t + 1. Computed anew, not read from the cache of prefixes.

        Raises:
            RolloutError: a sequence shorter than 2 tokens or not shorter than max_model_len.
        """
        for index, sequence in enumerate(sequences):
            if not 2 <= len(sequence) < self.max_model_len:
                raise RolloutError(
                    f"sequence {index} has {len(sequence)} tokens; log-probs need 2 to {self.max_model_len - 1}"
                )
        params = self._llm.scoring_params()
        outputs = self._run([(sequence, params) for sequence in sequences], None)
        self._forget_routes()
        return [[float(value) for value in output.prompt_logprobs.logprobs] for output in outputs]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replace the weights and forget what was computed with the old ones. Every rank of the engine calls it.

        Args:
            named_tensors: Hugging Face name and full tensor of every parameter; consumed in order, once, to its end. A
                tensor must keep its values until this function returns.
            version: stamped on every completion from now on.

        Raises:
            RuntimeError: a tensor is missing or came twice; the engine is then unusable.
        """
        self._prepare_loading()
        from megatron_rl.rollout.weight_loading import reload_weights

        self._engine.collective_rpc(reload_weights, args=(named_tensors,))
        self._finish_loading()
        self.weight_version = version

    def load_shards(
        self, shard: EngineShard, feed: Callable[[Loader], None], *, version: int, on_filled: OnFilled | None = None
    ) -> None:
        """Replace the weights by slices of trained shards, and forget what was computed with the old ones.

        Every rank of the engine calls it with what belongs to its own shard.

        Args:
            shard: what will come.
            feed: writes every slice to the loader that it is given, and ends its buckets.
            version: stamped on every completion from now on.
            on_filled: called with the name and the values of each parameter before vLLM prepares it for its kernels.

        Raises:
            TransferError: what came is not the engine's model; the engine is then unusable.
        """
        self._prepare_loading()
        from megatron_rl.rollout.weight_loading import load_shards

        self._engine.collective_rpc(load_shards, args=(shard, feed, on_filled))
        self._finish_loading()
        self.weight_version = version

    def sleep(self) -> None:
        """Give the GPU's memory to training: weights, keys and values are dropped. Nothing on a CPU."""
        if not self._llm.ON_CPU and not self._asleep:
            self._reset_prefix_cache()
            # With asynchronous scheduling a step may still be queued, whose memory would be unmapped under it.
            torch.cuda.synchronize()
            self._engine.sleep(level=2)  # every wake is followed by a sync, so the weights need no copy on the host
            self._asleep = True

    def wake_up(self) -> None:
        """Take the memory back for weights, which must be loaded next; keys and values follow them. Nothing on a CPU.

        Loading needs buffers that a GPU does not hold beside the cache of keys and values.
        """
        if self._asleep:
            gc.collect()
            torch.cuda.empty_cache()  # vLLM maps its memory itself, so PyTorch would not give its unused blocks back
            self._engine.wake_up(tags=["weights"])
            self._asleep, self._has_cache_to_map = False, True

    def shutdown(self) -> None:
        """Free the engine's memory and process groups; the caller's world stays. Engines of a process share groups."""
        core = self._engine.engine_core.engine_core
        if self._owns_world:
            core.shutdown()
        else:  # the same steps but for the last, which destroys torch.distributed's world
            from vllm.distributed import destroy_model_parallel, parallel_state

            core.structured_output_manager.clear_backend()
            core.model_executor.shutdown()
            core.scheduler.shutdown()
            destroy_model_parallel()
            if parallel_state._WORLD is not None:
                parallel_state._WORLD.destroy()
                parallel_state._WORLD = None
        del core, self._engine
        RolloutEngine._alive = False
        gc.collect()

    def _run(
        self, requests: Sequence[tuple[Sequence[int], Any]], on_progress: Callable[[int], None] | None
    ) -> list[Any]:
        """Outputs of (token ids, sampling parameters), in the order of the requests."""
        self._require_awake()
        outputs: dict[int, Any] = {}
        with ExitStack() as stack:
            stack.enter_context(random_states_kept())
            stack.enter_context(warnings.catch_warnings(action="ignore", category=FutureWarning))
            stack.enter_context(self._compilation())
            # Requests left behind by an exception, of on_progress too, would be decoded along with the next call's.
            stack.callback(lambda: self._abort(set(range(len(requests))) - set(outputs)))
            for index, (token_ids, params) in enumerate(requests):
                self._engine.add_request(str(index), {"prompt_token_ids": list(token_ids)}, params)
            while self._engine.has_unfinished_requests():
                finished = self._engine.step()
                outputs |= {int(output.request_id): output for output in finished}
                if on_progress is not None:
                    on_progress(len(finished))
        return [outputs[index] for index in range(len(requests))]

    def _abort(self, unfinished: set[int]) -> None:
        if unfinished:
            self._engine.abort_request([str(index) for index in unfinished])

    def _compilation(self) -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("force_eager") if self._interpreted else nullcontext()

    def _recorder_of_routes(self) -> Any:
        from megatron_rl.rollout.routes import RouteRecorder

        (recorder,) = self._engine.collective_rpc(RouteRecorder)
        return recorder

    def _forget_routes(self) -> None:
        if self._recorder is not None:
            self._recorder.forget()

    def _completion(self, output: Any, request: int, num_prompt_tokens: int) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended a completion with {output.finish_reason!r} after {len(output.token_ids)} tokens"
            )
        token_ids = tuple(output.token_ids)
        log_probs = tuple(float(value) for value in output.logprobs.logprobs)
        assert len(log_probs) == len(token_ids), "one log-prob per token"
        return Completion(
            token_ids=token_ids,
            log_probs=log_probs,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            finish_reason=output.finish_reason,
            weight_version=self.weight_version,
            routes=None
            if self._recorder is None
            else self._recorder.take(str(request), num_prompt_tokens + len(token_ids) - 1),
        )

    def _reset_prefix_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its cache of prefixes: requests are still running")

    def _prepare_loading(self) -> None:
        if self._asleep:
            raise RuntimeError("the rollout engine sleeps; call wake_up() first")
        if not self._llm.ON_CPU:
            torch.cuda.synchronize()  # a step that is still queued reads the weights that are about to change

    def _finish_loading(self) -> None:
        if self._has_cache_to_map:
            gc.collect()
            torch.cuda.empty_cache()
            self._engine.wake_up(tags=["kv_cache"])
            self._has_cache_to_map = False
        self._reset_prefix_cache()

    def _require_awake(self) -> None:
        if self._asleep:
            raise RuntimeError("the rollout engine sleeps; call wake_up() first")
        if self._has_cache_to_map:
            raise RuntimeError("the rollout engine has no weights since it slept; load them first")


def _keep_process_groups(client: Any) -> None:
    """Keep vLLM from destroying the caller's process groups when its engine is collected.

    Releases before 0.32 have no finalizer that would.
    """
    finalizer = getattr(client, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
