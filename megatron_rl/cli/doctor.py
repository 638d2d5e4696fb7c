"""`megatron-rl doctor`: what is installed, what it unlocks, what fails without the rest, and what a run takes.

    doctor                what this machine has. Versions come from the packages' metadata; only torch is imported
    doctor --interfaces   whether the installed releases have what this package calls
    doctor RUN_DIR        what happened to a run that is dead or hangs; see `runs.diagnosis`

Tests run on one release of each library, clusters on another. Three things can differ without a word until a run meets
them, and each is looked up here in what is installed, by importing it, in seconds and without a GPU:

    imports     every `from LIBRARY.module import name` of this package's own source, found by reading that source
    arguments   of the functions and classes that are called with them (`_CALLS`)
    text        routes, variables and attributes that have no signature, looked for in the library's files (`_TEXT`)
"""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import inspect
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import UserError
from megatron_rl.config.schema import AdamImplementation, ModelConfig
from megatron_rl.models.capabilities import LIBRARIES, capabilities, has_transformer_engine, installed_version
from megatron_rl.models.choices import choose
from megatron_rl.runs.diagnosis import diagnosis
from megatron_rl.runs.directory import RunDirectory


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("doctor", help="what is installed, and what it unlocks")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, nargs="?", help="a run that is dead or hangs")
    parser.add_argument("--interfaces", action="store_true", help="look up what is called of the installed releases")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 1 if a required library is absent."""
    if arguments.run_dir is not None:
        return _examine(arguments.run_dir)
    if arguments.interfaces:
        return _compare_interfaces()
    rows = [("python", platform.python_version(), ""), *devices()]
    failures = 0
    for library in LIBRARIES:
        version = installed_version(library)
        rows.append((library.name, version or "absent", library.unlocks if version else library.without))
        failures += library.required and version is None
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, state, meaning in rows:
        print(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {meaning}".rstrip())
    if not failures:
        print(f"\na run here takes: {choose(capabilities(), ModelConfig(), AdamImplementation.auto)}")
    return 1 if failures else 0


def _compare_interfaces() -> int:
    import megatron_rl.device  # noqa: F401  (core's modules find the device that they run on)
    from megatron_rl.rollout.isolation import isolated  # imports torch, which no other command waits for

    with isolated():
        count, found = problems()
    print("\n".join([*found, f"{count} interfaces looked up, {len(found)} of them are not as this package calls them"]))
    return 1 if found else 0


def _examine(run_dir: Path) -> int:
    run = RunDirectory(run_dir)
    if not run.logs_dir.is_dir():
        raise UserError(f"RUN_DIR: given '{run_dir}', allowed: the folder of a run, which has logs/")
    print("\n".join(diagnosis(run)))
    return 0


def devices() -> list[tuple[str, str, str]]:
    """Rows about the devices and the library that joins them, as torch sees them."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [
            ("CUDA", "absent", "ranks are CPU processes" if torch.version.cuda is None else "no GPU is visible"),
            ("NCCL", "absent", "ranks talk over gloo"),
        ]
    num_devices = torch.cuda.device_count()
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    return [
        ("CUDA", str(torch.version.cuda), f"{num_devices} x {torch.cuda.get_device_name(0)}"),
        ("NCCL", nccl, "collectives between GPUs"),
    ]


CALLED_LIBRARIES = ("megatron", "vllm", "modelopt", "transformer_engine")


@dataclass(frozen=True)
class Call:
    """A function or class, and arguments that it is given by name."""

    where: str
    """module:name, name possibly with dots."""
    arguments: tuple[str, ...]
    only_if: str = ""
    """A module without which the call is not made."""


_CALLS = (
    Call(
        "vllm:EngineArgs",
        (
            *("model", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
            *("distributed_executor_backend", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
            *("enforce_eager", "seed", "logprobs_mode", "enable_chunked_prefill", "use_tqdm_on_load"),
            *("hf_overrides", "load_format", "quantization", "kv_cache_memory_bytes", "block_size"),
            *("gpu_memory_utilization", "enable_sleep_mode", "worker_extension_cls"),
        ),
    ),
    Call(
        "vllm:SamplingParams",
        (
            *("temperature", "top_p", "max_tokens", "stop", "seed", "logprobs", "prompt_logprobs", "detokenize"),
            *("flat_logprobs", "output_kind", "skip_clone"),
        ),
    ),
    Call("vllm:LLMEngine", ("vllm_config", "executor_class", "log_stats")),
    Call("vllm:LLMEngine.add_request", ("request_id", "prompt", "params")),
    Call("vllm:LLMEngine.abort_request", ("request_ids",)),
    Call("vllm:LLMEngine.sleep", ("level",)),
    Call("vllm:LLMEngine.wake_up", ()),
    Call("vllm:LLMEngine.step", ()),
    Call("vllm:LLMEngine.has_unfinished_requests", ()),
    Call("vllm:LLMEngine.reset_prefix_cache", ()),
    Call("vllm:LLMEngine.collective_rpc", ("method", "args")),
    Call("vllm.v1.executor:Executor.get_class", ("vllm_config",)),
    Call("vllm.v1.executor.uniproc_executor:ExecutorWithExternalLauncher._distributed_args", ()),
    Call("vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_reload", ("model", "model_config")),
    Call("vllm.model_executor.model_loader.reload.meta:materialize_layer", ("layer", "info")),
    Call(
        "vllm.model_executor.model_loader.reload.types:LayerReloadingInfo",
        ("restore_metadata", "kernel_tensors", "load_numel", "load_numel_total"),
    ),
    Call("vllm.model_executor.model_loader.reload.types:LayerReloadingInfo.can_load", ()),
    Call(
        "megatron.core.transformer:TransformerConfig",
        (
            *("fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16", "num_layers_at_start_in_bf16"),
            *("num_layers_at_end_in_bf16", "batch_invariant_mode", "attention_backend", "apply_rope_fusion"),
            *("gradient_accumulation_fusion", "bias_activation_fusion", "masked_softmax_fusion"),
            *("variable_seq_lengths", "calculate_per_token_loss", "recompute_granularity", "sequence_parallel"),
            *("moe_enable_routing_replay", "hetereogenous_dist_checkpoint", "batch_p2p_sync", "overlap_p2p_comm"),
        ),
    ),
    Call(
        "megatron.core.optimizer:OptimizerConfig",
        ("optimizer", "lr", "min_lr", "weight_decay", "clip_grad", "bf16", "params_dtype", "fp8_recipe"),
    ),
    Call(
        "megatron.core.distributed:DistributedDataParallelConfig",
        ("grad_reduce_in_fp32", "fp8_param_gather", "use_distributed_optimizer", "overlap_grad_reduce"),
    ),
    Call(
        "megatron.core.models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec",
        ("config", "use_transformer_engine", "normalization", "vp_stage"),
    ),
    Call(
        "megatron.core.models.gpt:GPTModel",
        (
            "config",
            "transformer_layer_spec",
            "vocab_size",
            "pre_process",
            "post_process",
            "parallel_output",
            "vp_stage",
        ),
    ),
    Call(
        "megatron.core.packed_seq_params:PackedSeqParams",
        ("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"),
    ),
    Call("megatron.core.optimizer:Adam", ()),
    Call("megatron.core.optimizer.distrib_optimizer:Adam", ()),
    Call("transformer_engine.pytorch.optimizers:FusedAdam", ("lr", "betas", "eps"), "transformer_engine"),
    Call("transformer_engine.pytorch:fp8_autocast", ("enabled", "fp8_recipe", "fp8_group"), "transformer_engine"),
    Call("transformer_engine.pytorch:fp8_model_init", ("enabled", "recipe"), "transformer_engine"),
    Call("transformer_engine.common.recipe:DelayedScaling", ("fp8_format",), "transformer_engine"),
    Call("transformer_engine.common.recipe:Float8CurrentScaling", ("fp8_format",), "transformer_engine"),
    Call("transformer_engine.common.recipe:Float8BlockScaling", ("fp8_format",), "transformer_engine"),
    Call("transformer_engine.common.recipe:MXFP8BlockScaling", ("fp8_format",), "transformer_engine"),
    Call("apex.optimizers:FusedAdam", ("lr", "betas", "eps"), "apex"),
    Call("modelopt.torch.quantization:quantize", ("model", "config", "forward_loop"), "modelopt"),
    Call("modelopt.torch.quantization.nn:TensorQuantizer._get_amax", ("inputs",), "modelopt"),
)

_TEXT = {
    "vllm/entrypoints": (
        *('"/health"', '"/pause"', '"/resume"', '"/collective_rpc"', '"/reset_prefix_cache"'),
        *('"/inference/v1/generate"', '"/update_weight_version"', "enable_scale_out"),
    ),
    "vllm/envs.py": (
        *("VLLM_BATCH_INVARIANT", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_SERVER_DEV_MODE", "VLLM_LOGGING_LEVEL"),
        "VLLM_NO_USAGE_STATS",
    ),
    "vllm/v1/engine/core.py": (
        *("self.model_executor =", "self.scheduler:", "self.structured_output_manager ="),
        "def shutdown(",
    ),
    "megatron/core/optimizer/__init__.py": ("USING_PYTORCH_OPTIMIZER",),
    "megatron/core/optimizer/distrib_optimizer.py": ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"),
    "megatron/core/transformer/custom_layers/batch_invariant_kernels.py": (
        *(
            "_batch_invariant_MODE",
            "_batch_invariant_LIB",
            "def _te_patch_for_batch_invariant",
            "def mm_batch_invariant",
        ),
        *("def addmm_batch_invariant", "def disable_batch_invariant_mode"),
    ),
}


def problems() -> tuple[int, list[str]]:
    """Look everything up.

    Returns:
        How many things were looked up, and a line for each that the installed releases do not have.
    """
    checks = [*_imports(imported_names()), *map(_call, filter(_is_made, _CALLS)), *_texts(_TEXT)]
    return len(checks), [problem for check in checks if (problem := check()) is not None]


def imported_names() -> set[tuple[str, str]]:
    """(module, name) of every import from the libraries in this package's source."""
    found: set[tuple[str, str]] = set()
    for file in Path(__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in CALLED_LIBRARIES:
                found |= {(str(node.module), alias.name) for alias in node.names}
    return found


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _is_made(call: Call) -> bool:
    module = call.only_if or call.where.partition(":")[0]
    return has_transformer_engine() if module == "transformer_engine" else _installed(module)


def _imports(names: set[tuple[str, str]]) -> Iterator[Callable[[], str | None]]:
    for module, name in sorted(names):
        if _installed(module):
            yield lambda module=module, name=name: _missing(module, name)  # type: ignore[misc]


def _missing(module: str, name: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"{module}: cannot be imported: {error}"
    if hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None:
        return None
    return f"{module} has no {name}"


def _call(call: Call) -> Callable[[], str | None]:
    def check() -> str | None:
        module, _, path = call.where.partition(":")
        try:
            target: Any = importlib.import_module(module)
        except ImportError as error:
            return f"{module}: cannot be imported: {error}"
        for part in path.split("."):
            if not hasattr(target, part):
                return f"{call.where}: there is no {part}"
            target = getattr(target, part)
        known = _parameters(target)
        unknown = [name for name in call.arguments if known is not None and name not in known]
        return f"{call.where} takes no {', '.join(unknown)}" if unknown else None

    return check


def _parameters(target: Any) -> set[str] | None:
    """Names of what can be given, or, of a dataclass, read; None: anything."""
    if dataclasses.is_dataclass(target):
        return {field.name for field in dataclasses.fields(target)}
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # written in C, or msgspec's
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


def _texts(wanted: Mapping[str, Sequence[str]]) -> Iterator[Callable[[], str | None]]:
    for place, texts in wanted.items():
        library, _, inside = place.partition("/")
        spec = importlib.util.find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            continue
        path = next((p for root in spec.submodule_search_locations if (p := Path(root) / inside).exists()), None)
        for text in texts:
            yield lambda path=path, text=text, place=place: _absent(path, text, place)  # type: ignore[misc]


def _absent(path: Path | None, text: str, place: str) -> str | None:
    files = [] if path is None else [path] if path.is_file() else sorted(path.rglob("*.py"))
    return None if any(text in file.read_text() for file in files) else f"{place} has no {text}"
