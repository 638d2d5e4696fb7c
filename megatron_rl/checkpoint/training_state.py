"""What a checkpoint contains, and how a run resumes from it, as if it had never stopped.

    model, optimizer, scheduler   of every trained model by its name; of `policy` without a prefix, so that its tensors
                                  are those of any Megatron checkpoint of the model
    rng_state                     the random generators of every rank
    reference                     the weights of a reference policy that moves, split as the policy's are
    run_state                     the trainer's own, of plain Python values, equal on all ranks
    layout                        of the ranks that saved it; only the generators need it: all tensors are stored whole

`to_save` and `load` do it for the models, `reference_to_save` and `load_reference` for the reference, `resume` finds
the latest complete checkpoint and loads it.

Generators: at the layout that saved them every rank gets its own back. At another layout each takes the Python, NumPy
and torch generators of rank 0, and the streams of core's dropout, which differ between tensor-parallel ranks, are
seeded again from the run's seed. Data order and sampling depend on no generator: they are functions of the seed and the
position in the data.

Reference: a fixed one is not stored, it is the checkpoint that the run started from.

Resuming: the ranks check the files of a candidate together, each a part of them, and decide together. A damaged
checkpoint is named, and the one before it is tried; its step is then made and written again.

`writer.py` writes a checkpoint, `folders.py` names it, `integrity.py` checks it.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megatron_rl.checkpoint import optimizer_state
from megatron_rl.checkpoint.folders import CheckpointError, iteration_folder, latest_step, steps_on_disk
from megatron_rl.checkpoint.integrity import check_digests, check_files, loading
from megatron_rl.device import HAS_CUDA
from megatron_rl.engine.optimizer import Optimizer
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.reference import ReferenceWeights
from megatron_rl.models.model_config import resolved_config

_RNG_KEY = "rng_state"


def random_state_to_save() -> ShardedObject:
    """This rank's generators."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if HAS_CUDA else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(_RNG_KEY, state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def random_state_to_load(*, saved_world_size: int, same_layout: bool) -> ShardedObject:
    """What this rank loads: its own, or those of the rank 0 that was."""
    return ShardedObject(_RNG_KEY, None, (saved_world_size,), (dist.get_rank() if same_layout else 0,), replica_id=0)


def restore_random_state(state: dict[str, Any], *, same_layout: bool) -> None:
    """Set the generators to a loaded state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if not same_layout:
        return
    if HAS_CUDA:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


POLICY = "policy"


@dataclass(frozen=True)
class Trained:
    """A model with the optimizer that trains it."""

    model: Policy
    optimizer: Optimizer

    def sharded(self) -> dict[str, Any]:
        """Core's description of every tensor of the model, by chunk."""
        return {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(self.model.models)}


Models = Mapping[str, Trained]
"""By name; one is called `POLICY`."""


def to_save(models: Models, run_state: dict[str, Any]) -> dict[str, Any]:
    """The whole state for core to write; collective. The run's own is equal on all ranks: core writes rank 0's."""
    state: dict[str, Any] = {
        "rng_state": random_state_to_save(),
        "layout": _layout(models),
        "models": {name: _described(trained.model) for name, trained in models.items()},
        "run_state": run_state,
        "schedulers": {name: trained.optimizer.scheduler.state_dict() for name, trained in models.items()},
    }
    for name, trained in models.items():
        model = trained.sharded()
        of_model = {"model": model, "optimizer": optimizer_state.tensors_to_save(trained.optimizer, model)}
        state |= _named(name, of_model)
    return state


@torch.no_grad()
def load(checkpoints: Path, step: int, models: Models) -> dict[str, Any]:
    """Restore the state after `step` steps and return its `run_state`; collective over all ranks.

    Raises:
        CheckpointError: files are missing or damaged, or it is no run's checkpoint, or of a run with other models.
    """
    folder = iteration_folder(checkpoints, step)
    check_files(folder)
    with loading(folder):
        common = dist_checkpointing.load_common_state_dict(str(folder))
    layout = common.get("layout")
    if layout is None:
        raise CheckpointError(f"{folder} holds a model without training state; a run cannot be resumed from it")
    saved = sorted(common["schedulers"])
    if saved != sorted(models):
        raise CheckpointError(f"{folder} holds the state of {', '.join(saved)}; this run trains {', '.join(models)}")
    for name, before in common.get("models", {}).items():
        now = _described(models[name].model)
        for field in before.keys() & now.keys():
            if before[field] != now[field]:
                raise CheckpointError(
                    f"{folder}: {field} of the {name} is {before[field]}, this run's is {now[field]}; "
                    "allowed: the same model, or another name for the run"
                )
    same_layout = layout == _layout(models)
    template: dict[str, Any] = {
        "rng_state": random_state_to_load(saved_world_size=layout["world"], same_layout=same_layout)
    }
    model_states = {name: trained.sharded() for name, trained in models.items()}
    for name, trained in models.items():
        needed = optimizer_state.tensors_to_load(trained.optimizer, model_states[name])
        # Sharded anew: a prefix changes the entries in place, and `restore` finds its parameters by them.
        template |= _named(name, {"model": trained.sharded(), "optimizer": needed})
    with loading(folder):
        # Core's check of the template wants every tensor read by its main replica; here a rank reads what it steps.
        state = dist_checkpointing.load(template, str(folder), validate_access_integrity=False)
    for name, trained in models.items():
        loaded = state if name == POLICY else state[name]
        for number, chunk in enumerate(trained.model.models):
            chunk.load_state_dict(loaded["model"][str(number)])
        optimizer_state.restore(trained.optimizer, model_states[name], loaded["optimizer"])
        trained.optimizer.resume_schedule(state["schedulers"][name])
    restore_random_state(state["rng_state"], same_layout=same_layout)
    run_state: dict[str, Any] = state["run_state"]
    return run_state


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "moe_intermediate_size", "num_experts_per_tok"),
)


def _described(model: Policy) -> dict[str, Any]:
    """What two models must share for one to take up the other's state."""
    hf = resolved_config(model.hf)
    sizes = {name: hf[name] for name in _SIZES if hf.get(name) is not None}
    return {"architecture": hf["architectures"][0], **sizes, "params_dtype": str(model.dtype).removeprefix("torch.")}


def _named(name: str, state: dict[str, Any]) -> dict[str, Any]:
    if name == POLICY:
        return state
    add_prefix_for_sharding(state, f"{name}.")
    return {name: state}


def _layout(models: Models) -> dict[str, int]:
    groups = models[POLICY].model.groups
    sizes = {name: getattr(groups, name).size() for name in ("tp", "cp", "pp", "dp", "ep", "etp")}
    return {**sizes, "world": dist.get_world_size()}


REFERENCE_KEY = "reference"


def reference_to_save(reference: ReferenceWeights) -> dict[str, Any]:
    """Core's description of every weight, to be added to the state that is saved."""
    entries: dict[int, ShardedTensor | ShardedTensorFactory] = {}
    for chunk in reference.policy.chunks:
        model = getattr(chunk, "module", chunk).sharded_state_dict()
        for entry in nested_values(model):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data is not None:
                entries[entry.data.data_ptr()] = entry
    return {
        REFERENCE_KEY: {
            name: make_sharded_optimizer_tensor(
                entries[parameter.data_ptr()], reference.weights[name], prefix=REFERENCE_KEY
            )
            for name, parameter in reference.parameters().items()
        }
    }


@torch.no_grad()
def load_reference(checkpoints: Path, step: int, reference: ReferenceWeights) -> None:
    """Restore the weights of the checkpoint after `step` steps; collective over all ranks.

    Raises:
        CheckpointError: files are missing or damaged, or the run had no reference that moves.
    """
    folder = iteration_folder(checkpoints, step)
    with loading(folder):
        loaded = dist_checkpointing.load(reference_to_save(reference), str(folder))[REFERENCE_KEY]
    for name, weight in loaded.items():
        reference.weights[name].copy_(weight)


def resume(checkpoints: Path, models: Models, *, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Restore the latest whole checkpoint and return its `run_state`; None if there is none. Collective.

    Args:
        say: called on rank 0 with every checkpoint that is skipped, and why.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or it is of another kind of run.
    """
    candidates: list[Any] = [_candidates(checkpoints) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(candidates, src=0)
    steps, problem = candidates[0]
    if problem is not None and dist.get_rank() == 0:
        say(problem)
    for step in steps:
        problem = _problem(iteration_folder(checkpoints, step))
        if problem is None:
            return load(checkpoints, step, models)
        if dist.get_rank() == 0:
            say(f"{problem}; going back to an earlier checkpoint")
    if steps or problem is not None:
        raise CheckpointError(f"{checkpoints}: no whole checkpoint is left: {problem}")
    return None


def _candidates(checkpoints: Path) -> tuple[list[int], str | None]:
    """Steps to try, the one that is named as the latest first; and what is wrong with that name.

    Where the name is of no use, all are tried. Steps after a latest one that was named on purpose are not.
    """
    try:
        latest = latest_step(checkpoints)
    except (CheckpointError, OSError) as error:
        return steps_on_disk(checkpoints)[::-1], str(error)
    return [step for step in reversed(steps_on_disk(checkpoints)) if latest is None or step <= latest], None


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks; None if it is whole."""
    mine = None
    try:
        check_files(folder)
        check_digests(folder, part=dist.get_rank(), num_parts=dist.get_world_size())
    except CheckpointError as error:
        mine = str(error)
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    return next((problem for problem in problems if problem is not None), None)
