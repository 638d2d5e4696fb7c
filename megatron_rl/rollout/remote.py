"""An engine in processes of its own, with the methods of `RolloutEngine`.

`RemoteEngine` is the client of a vLLM server, `NoEngine` stands for it on ranks that drive none, and
`server_arguments` turns a configuration into the server's command line. In a weight sync, in which all trained ranks
take part, the rank that drives the engine does:

    pause -> ask the workers to load -> (all ranks send) -> set the version -> resume

On a failure the engine stays paused or is ended, so that no engine with a mixture of versions serves; it is restarted
and gets the current version in another round.

`update_mode` says what happens to requests in flight: `keep` continues them with the new weights and recomputes their
KV cache; `wait` finishes them first; `abort` ends them. A completion's weight version is the oldest that made a part.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.data.samples import Completion, Prompt
from megatron_rl.device import HAS_CUDA
from megatron_rl.rollout.address import EngineLost
from megatron_rl.rollout.hosting import HostedServer
from megatron_rl.rollout.sampling import RolloutError, Sampling, sample_seed
from megatron_rl.rollout.server import EngineServer
from megatron_rl.weights.plan.rank_plan import RankPlan
from megatron_rl.weights.transport.sockets import Endpoint

_CONTROL_SECONDS = 60.0
_HEALTH_SECONDS = 10.0
_LOOK_SECONDS = 5.0
"""How often a server that generates is asked how far it is, and how long it has for the answer."""
_UNANSWERED = 3
"""Looks in a row that a server may leave unanswered."""
_GENERATED = re.compile(r"^vllm:generation_tokens_total(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


class NoEngine:
    """The engine of a rank that drives none. `folder`: see `RemoteEngine`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def generate(self, prompts: Sequence[Prompt], **_: Any) -> list[list[Completion]]:
        """No completions, of no prompts."""
        assert not prompts
        return []

    def sleep(self) -> None:
        """Nothing."""

    def wake_up(self) -> None:
        """Nothing."""


class RemoteEngine:
    """A rank's client of an engine that runs in a server."""

    def __init__(
        self,
        server: EngineServer | HostedServer,
        *,
        folder: Path,
        decode: Callable[[Sequence[int]], str],
        max_model_len: int,
        update_mode: str = "keep",
        request_seconds: float = 3600.0,
        stall_seconds: float = 300.0,
    ) -> None:
        """Args:
        server: answers; its model's weights are version 0.
        folder: where weights pass through, shared with the trained ranks.
        decode: token ids to text.
        max_model_len: longest prompt + completion, tokens; as in the server's arguments.
        update_mode: 'keep', 'wait' or 'abort'.
        request_seconds: limit of one request.
        stall_seconds: longest time in which a server that has requests generates no token.
        """
        self.server, self.folder, self._decode = server, folder, decode
        self.max_model_len, self.weight_version = max_model_len, 0
        self._is_stalled = False
        self._update_mode, self._request_seconds, self._stall_seconds = update_mode, request_seconds, stall_seconds

    def answers(self) -> bool:
        """Whether the server is alive and not frozen."""
        if self._is_stalled:
            return False
        try:
            self.server.address.get("/health", timeout_seconds=_HEALTH_SECONDS)
        except EngineLost:
            return False
        return True

    def restart(self, on_progress: Callable[[], object] = lambda: None) -> None:
        """End what is left of the server and start it again; it has version 0 until the next synchronisation.

        Args:
            on_progress: called now and then while it starts.
        """
        self.weight_version = 0
        self.server.restart(on_progress)
        self._is_stalled = False

    def set_rank_plans(self, rank_plans: dict[int, RankPlan], *, max_changed: float) -> dict[int, Endpoint]:
        """Give each rank of the engine its rank plan; once for each start of the server.

        Args:
            rank_plans: by rank of the shard plan; an engine's ranks are consecutive.
            max_changed: see `Exchange`.

        Returns:
            The endpoint of each rank.

        Raises:
            EngineLost: the engine does not answer.
        """
        address = self.server.address
        request = {
            "rank_plans": {str(rank): rank_plan.to_text() for rank, rank_plan in rank_plans.items()},
            "first_rank": min(rank_plans),
            "host": address.host,
            "max_changed": max_changed,
        }
        workers = self._ask_workers("set_rank_plan", request, _CONTROL_SECONDS)
        return {worker["rank"]: Endpoint(address.host, worker["port"], address.token) for worker in workers}

    def load(self, name: str, transport: dict[str, Any], *, version: int, verify: str, timeout_seconds: float) -> None:
        """Load one version that the trained ranks send, and resume.

        Args:
            name: of the round, used once.
            transport: from `Sender.begin` of `sync/transports.py`; the workers open their side with it.
            version: of the weights.
            verify: see `SyncConfig`.
            timeout_seconds: limit of each wait of the ranks.

        Raises:
            EngineLost: the engine died, or has not loaded them; it is not resumed.
        """
        address = self.server.address
        address.post("/pause", mode=self._update_mode, clear_cache="true", timeout_seconds=self._pause_seconds())
        request = {
            "round": name,
            "transport": transport,
            "version": version,
            "verify": verify,
            "timeout_seconds": timeout_seconds,
        }
        workers = self._ask_workers("load_trained_shards", request, 2 * timeout_seconds + _CONTROL_SECONDS)
        errors = [worker["error"] for worker in workers if "error" in worker]
        if errors:
            raise EngineLost(errors[0])
        address.post("/update_weight_version", {"new_version": str(version)}, timeout_seconds=_CONTROL_SECONDS)
        address.post("/reset_prefix_cache", reset_running_requests="true", timeout_seconds=_CONTROL_SECONDS)
        address.post("/resume", timeout_seconds=_CONTROL_SECONDS)
        self.weight_version = version

    def _ask_workers(self, method: str, request: dict[str, Any], timeout_seconds: float) -> list[dict[str, Any]]:
        body = {"method": method, "args": [json.dumps(request)]}
        answer = self.server.address.post("/collective_rpc", body, timeout_seconds=timeout_seconds)
        return list(answer["results"])

    def _pause_seconds(self) -> float:
        return self._request_seconds if self._update_mode == "wait" else _CONTROL_SECONDS

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        sampling: Sampling,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """As `RolloutEngine.generate`; `on_progress` is also called, with 0, whenever tokens were generated. And

        Raises:
            EngineLost: the server died, does not answer, has generated nothing for `stall_seconds`, or a completion was
                aborted or took too long.
        """
        for prompt in prompts:
            if not 0 < len(prompt.token_ids) < self.max_model_len:
                raise RolloutError(
                    f"prompt {prompt.prompt_id} ({prompt.source}) has {len(prompt.token_ids)} tokens; "
                    f"rollout.max_model_len allows 1 to {self.max_model_len - 1}"
                )
        requests = [
            (prompt, sample_seed(seed, sample))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for sample in range(num_samples)
        ]
        pool = ThreadPoolExecutor(max_workers=max(1, min(len(requests), 256)))
        try:
            futures = [pool.submit(self._complete, prompt, sampling, seed) for prompt, seed in requests]
            self._watch(futures, on_progress or (lambda _: None))
            completions = [future.result() for future in futures]
        finally:  # of a server that is lost, whose end ends them, requests are not waited for
            pool.shutdown(wait=False, cancel_futures=True)
        return [completions[start : start + num_samples] for start in range(0, len(completions), num_samples)]

    def _watch(self, futures: Sequence["Future[Completion]"], on_progress: Callable[[int], None]) -> None:
        """Wait for all requests, or for the first that fails, and tell how far they are.

        Raises:
            EngineLost: the server does not answer, or generates nothing.
        """
        num_done, moved_at, unanswered = 0, time.monotonic(), 0
        tokens: float | None = None
        while True:
            done, running = wait(futures, _LOOK_SECONDS, return_when=FIRST_EXCEPTION)
            now = time.monotonic()
            if len(done) > num_done:
                on_progress(len(done) - num_done)
                num_done, moved_at = len(done), now
            if not running or any(future.exception() for future in done):
                return
            try:
                generated, unanswered = self._generated_tokens(), 0
            except EngineLost:
                unanswered += 1
                if unanswered == _UNANSWERED:
                    raise
                continue
            if generated is None or generated != tokens:
                on_progress(0)
                tokens, moved_at = generated, now
            elif now - moved_at > self._stall_seconds:
                self._is_stalled = True  # its front may still answer
                address = self.server.address
                raise EngineLost(
                    f"engine at {address.host} port {address.port}: no token in {now - moved_at:.0f} s, "
                    f"with {len(running)} requests unfinished"
                )

    def _generated_tokens(self) -> float | None:
        """Tokens that the server has generated since it was started; None: it does not count (disable_log_stats)."""
        text = self.server.address.get_text("/metrics", timeout_seconds=_LOOK_SECONDS)
        counts = _GENERATED.findall(text)
        return sum(map(float, counts)) if counts else None

    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": min(sampling.max_response_tokens, self.max_model_len - len(prompt.token_ids)),
            "stop": list(sampling.stop),
            "seed": seed,
            "logprobs": 0,
            "detokenize": bool(sampling.stop),
        }
        body = {"token_ids": list(prompt.token_ids), "sampling_params": params}
        version_before = self.weight_version
        answer = self.server.address.post("/inference/v1/generate", body, timeout_seconds=self._request_seconds)
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise EngineLost(f"prompt {prompt.prompt_id}: the engine ended a completion: {choice['finish_reason']!r}")
        # "default" until the first synchronisation.
        spans = choice.get("weight_versions") or []
        versions = [int(v) if (v := span["version"]).isdecimal() else 0 for span in spans]
        return Completion(
            token_ids=tuple(choice["token_ids"]),
            log_probs=tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
            text=self._decode(choice["token_ids"]),
            finish_reason=choice["finish_reason"],
            weight_version=min(versions, default=version_before),
        )

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As `RolloutEngine.log_probs`."""
        out = []
        for sequence in sequences:
            params = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
            body = {"token_ids": list(sequence), "sampling_params": params}
            answer = self.server.address.post("/inference/v1/generate", body, timeout_seconds=self._request_seconds)
            entries = answer["prompt_logprobs"][1:]
            out.append([entry[str(token)]["logprob"] for entry, token in zip(entries, sequence[1:], strict=True)])
        return out

    def sleep(self) -> None:
        """Nothing: the engine has devices of its own."""

    def wake_up(self) -> None:
        """Nothing: the engine has devices of its own."""

    def shutdown(self) -> None:
        """End the server."""
        self.server.end()


def server_arguments(rollout: RolloutConfig, *, dtype: str, seed: int, max_model_len: int) -> list[str]:
    """Arguments of vLLM's server for a configuration."""
    chosen: dict[str, Any] = {
        "logprobs_mode": "processed_logprobs",
        "max_model_len": max_model_len,
        "dtype": dtype,
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "max_num_seqs": rollout.max_num_seqs,
        "seed": seed,
        "enforce_eager": rollout.enforce_eager,
        "enable_scale_out": True,  # opens /inference/v1/generate, which takes and gives token ids
    }
    if HAS_CUDA:
        chosen["gpu_memory_utilization"] = rollout.gpu_memory_utilization
    else:
        chosen |= {"kv_cache_memory_bytes": int(rollout.kv_cache_gigabytes * 1e9), "block_size": 32}
    arguments: list[str] = []
    for name, value in (chosen | rollout.engine_args).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [flag] if value else ["--no-" + flag[2:]]
        else:
            arguments += [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return arguments
