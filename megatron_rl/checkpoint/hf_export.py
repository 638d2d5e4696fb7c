"""The policy as a Hugging Face checkpoint: all ranks write their shards into one folder, in config.json's dtype."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rl.checkpoint.folders import cannot_write
from megatron_rl.config.errors import UserError
from megatron_rl.engine.policy import Policy
from megatron_rl.models.tensor_map import TensorMap
from megatron_rl.weights.files.hf_checkpoint import HFCheckpointFiles
from megatron_rl.weights.files.hf_writer import ExportPlan, ShardWriter, begin, complete
from megatron_rl.weights.files.local_shards import Place
from megatron_rl.weights.files.safetensors_files import DTYPES
from megatron_rl.weights.files.stored_forms import FLOATS, StoredTensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


DTYPES_OF_WEIGHTS = tuple(_DTYPES.values())


def checkpoint_dtype(hf: dict[str, Any], source: Path | None = None) -> torch.dtype:
    """Dtype that a config.json says its tensors have, else that of the first of them, else float32.

    Args:
        hf: config.json.
        source: its folder.

    Raises:
        UserError: another one than those of `_DTYPES`.
    """
    name = hf.get("dtype") or hf.get("torch_dtype")
    if name is None:
        floats = [tensor for tensor in _stored(source).values() if tensor.dtype in FLOATS] if source else []
        return DTYPES[floats[0].dtype] if floats else torch.float32
    if name not in _DTYPES:
        raise UserError(f"dtype '{name}' in config.json is not supported; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _stored(source: Path) -> dict[str, StoredTensor]:
    """The tensors of the source; a config.json may come without any."""
    return HFCheckpointFiles(source).tensors if any(source.glob("*.safetensors")) else {}


def written_dtypes(source: Path, hf: dict[str, Any]) -> Callable[[str], torch.dtype]:
    """Dtype of each written tensor: that of the source's tensor, or config.json's where that is none to train in."""
    default = checkpoint_dtype(hf, source)
    stored = _stored(source)

    def dtype_of(name: str) -> torch.dtype:
        dtype = DTYPES.get(stored[name].dtype, default) if name in stored else default
        return dtype if dtype in DTYPES_OF_WEIGHTS else default

    return dtype_of


def written_config(source: Path, hf: dict[str, Any]) -> dict[str, Any] | None:
    """The config.json of what is written: without a quantisation, and layers, that are left out; None: as it was."""
    config = {key: value for key, value in hf.items() if key != "quantization_config"}
    after_last = f"model.layers.{hf['num_hidden_layers']}."
    if any(name.startswith(after_last) for name in _stored(source)):
        config["num_nextn_predict_layers"] = 0
    return None if config == hf else config


def export_hf(policy: Policy, folder: Path, *, max_file_bytes: int = 5 << 30) -> None:
    """Write the policy's weights in the source checkpoint's dtypes, with its config, tokenizer and other files.

    Collective over all ranks, each of which writes what it holds. `folder` appears when it is complete.

    Raises:
        CheckpointError: a rank could not write, for want of room or permission. Nothing is left behind then.
    """
    source, hf = policy.hf_path, policy.hf
    plan = ExportPlan(policy.maps, written_dtypes(source, hf), max_file_bytes=max_file_bytes)
    partial = folder.with_name(f".{folder.name}.partial")
    leads = dist.get_rank() == 0
    together(folder, lambda: plan.create(begin(folder)) if leads else None)
    together(folder, lambda: _write_shards(policy, plan, partial))
    config = policy.export_config() or written_config(source, hf)
    together(folder, lambda: complete(partial, folder, source=source, config=config) if leads else None)


def _write_shards(policy: Policy, plan: ExportPlan, partial: Path) -> None:
    place = Place.of(policy.groups)
    with ShardWriter(plan, partial) as writer:
        for tensor_map in _mine(policy):
            writer.write(tensor_map, *place.in_group_of(tensor_map), policy.parameters[tensor_map.name])


def _mine(policy: Policy) -> Iterator[TensorMap]:
    """The shards that this rank writes: owners of the same shard take turns."""
    groups = policy.groups
    experts = parallel_state.get_expert_data_parallel_rank(), parallel_state.get_expert_data_parallel_world_size()
    others = groups.dp_cp.rank(), groups.dp_cp.size()
    place = Place.of(groups)
    for turn, tensor_map in enumerate(policy.maps):
        if tensor_map.name not in policy.parameters:
            continue
        rank, size = others if tensor_map.expert is None else experts
        part, parts = place.in_group_of(tensor_map)
        if turn % size == rank and (not tensor_map.replicated or turn % parts == part):
            yield tensor_map


def together(folder: Path, action: Callable[[], None]) -> None:
    """Do something on every rank; if the file system refuses it on one, fail on all, and clean up.

    Raises:
        CheckpointError: no room for `folder`, no permission, or what else the operating system said.
    """
    failure: OSError | None = None
    try:
        action()
    except OSError as error:
        failure = error
    failures: list[OSError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    first = next((one for one in failures if one is not None), None)
    if first is None:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(folder.with_name(f".{folder.name}.partial"), ignore_errors=True)
    raise cannot_write(folder, first) or first from first
